"""What a program costs on GPUs that are not here: compiled, read and counted."""
