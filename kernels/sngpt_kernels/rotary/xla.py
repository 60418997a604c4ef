"""The operation in plain jax, for any device."""

import jax
import jax.numpy as jnp
from jax import Array


def apply_rotary(x_BTHh: Array, tables: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]) -> Array:
    """Rotates each pair (j, j + r/2) of a head's leading r dimensions; `tables` [1 or B, T, r/2].

    Computed in float32; returns x's dtype.
    """
    cos, sin = (jnp.asarray(table)[:, :, None] for table in tables)
    half = cos.shape[-1]
    # slices, because the gradient of jnp.split is a concatenation that XLA joins to nothing
    parts = (x_BTHh[..., :half], x_BTHh[..., half : 2 * half])
    x1, x2 = (part.astype(jnp.float32) for part in parts)
    turned = (x1 * cos + x2 * sin, x2 * cos - x1 * sin)
    return jnp.concatenate(
        [*(x.astype(x_BTHh.dtype) for x in turned), x_BTHh[..., 2 * half :]], axis=-1
    )


def _normalized(x: Array, eps: float) -> Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse).astype(x.dtype)


def prepare(
    x: Array, gain: Array, cos: Array, sin: Array, eps: float, values: tuple[int, ...] = ()
) -> tuple[Array, ...]:
    """`api.prepare` of valid arguments. Each of the three steps rounds to x's dtype."""
    first, end = gain.shape[0], x.shape[2] - sum(values)
    q, k = (
        apply_rotary(_normalized(part, eps), (cos, sin))
        for part in (x[:, :, :first], x[:, :, first:end])
    )
    v = [x[:, :, (last := end + sum(values[:i])) : last + n] for i, n in enumerate(values)]
    return q * gain.astype(x.dtype)[None, None, :, None], k, *v
