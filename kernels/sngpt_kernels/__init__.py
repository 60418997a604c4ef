"""Operations for accelerators: sparse coding (`cayley`) and attention (`xsa`). Imports jax and
numpy, never sngpt_jax.

This module and the packages below it import nothing by themselves, so that a dictionary can be
read without jax.
"""
