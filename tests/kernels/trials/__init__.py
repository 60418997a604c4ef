"""One small kernel in the two languages that jax names as successors of Pallas Triton.

They are trials and no part of the library. docs/kernels.md has what they showed.
"""
