"""Sparse and compact GPTs in JAX: train at the hardware's speed, squeeze into a byte budget, score
honestly.

Importing this package imports nothing heavy; data preparation and the configuration run without
jax.
"""

from sngpt_jax.base import interrupts

__version__ = "0.1.0"

interrupts.expect_interrupts()  # before anything heavy is imported
