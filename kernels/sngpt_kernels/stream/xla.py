"""The operation in plain jax, for any device."""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def sum_norm(
    arrays: tuple[tuple[Array, ...], ...],
    weights: tuple[Array | None, ...],
    gain: Array | None,
    eps: float,
    scale: float,
    uses: int = 1,
    first: bool = False,
) -> tuple[Array, ...]:
    """`api.sum_norm` of valid arguments. Each result is rounded once."""

    def inner(group: tuple[Array, ...]) -> Array:
        wide = [x.astype(jnp.float32) for x in group] or [jnp.ones((), jnp.float32)]
        return functools.reduce(jnp.add, wide)

    def widened(group: tuple[Array, ...], weight: Array | None) -> Array:
        total = inner(group)
        return total if weight is None else total * weight.reshape(*(1,) * (ndim - 1), -1)

    dtype, ndim = arrays[0][0].dtype, arrays[0][0].ndim
    u = functools.reduce(jnp.add, map(widened, arrays, weights)).astype(dtype)
    u32 = u.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(u32), axis=-1, keepdims=True) + eps)
    n = u32 * (scale * inverse)
    if gain is not None:
        n *= gain.reshape(*(1,) * (ndim - 1), -1)
    kept = (inner(arrays[0]).astype(dtype),) if first else ()
    return u, *(n.astype(dtype),) * uses, *kept
