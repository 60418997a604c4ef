"""Sparse and compact GPTs in JAX: train at the hardware's speed, squeeze into a byte budget, score honestly.

Importing this package imports nothing heavy; data preparation and the configuration run without jax.
"""

import kernels  # noqa: F401 - it prepares a command for Ctrl-C, before anything heavy is imported

__version__ = "0.1.0"
