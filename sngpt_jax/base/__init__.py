"""What everything stands on: errors, files, strict JSON, the terminal, the edge of a command.
Nothing here imports jax.
"""
