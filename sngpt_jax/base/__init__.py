"""What all rooms share: errors, files, strict JSON, the terminal. Nothing here imports jax."""
