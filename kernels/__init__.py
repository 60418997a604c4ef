"""Operations for accelerators. Imports jax and numpy, never sngpt_jax."""

from kernels import commands

commands.expect_interrupts()
