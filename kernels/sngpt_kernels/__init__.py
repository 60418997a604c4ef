"""Operations for accelerators: sparse coding (`cayley`) and attention (`xsa`).

They import jax and numpy and never sngpt_jax. The packages themselves import nothing, so that
`cayley.dictionary` runs without jax.
"""
