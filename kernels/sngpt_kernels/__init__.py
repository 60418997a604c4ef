"""Operations for accelerators, each in a package of its own.

`cayley` is a sparse code, `xsa` an attention, `rotary` what prepares queries and keys, `epilogue`
what follows an attention, `stream` a sum of the residual stream with its norm, and `mlp` a block's
products with epilogues.

They import jax and numpy and never sngpt_jax. The packages themselves import nothing, so that
`cayley.dictionary` runs without jax.
"""
