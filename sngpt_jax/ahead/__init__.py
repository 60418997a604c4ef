"""The cost of a program on GPUs that this machine need not have: compiled, read and counted."""
