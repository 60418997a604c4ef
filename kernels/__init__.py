"""Operations for accelerators. Imports jax and numpy, never sngpt_jax."""
