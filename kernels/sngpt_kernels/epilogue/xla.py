"""The operation in plain jax, for any device."""

import jax
import jax.numpy as jnp
from jax import Array


def exclude_own_value(y: Array, v: Array) -> Array:
    """y - ⟨y, v̂⟩ v̂ with v̂ = v / max(|v|, 1e-12): y without the direction of its own value.

    Exclusive self-attention (XSA), arXiv:2603.09078. y is [B, T, H, h] and v [B, T, K, h]. Head i
    takes the v of its position and of key/value head ⌊i · K / H⌋. It computes in float32 and
    returns y's dtype.
    """
    B, T, H, h = y.shape
    K = v.shape[2]
    y_BTKGh = y.astype(jnp.float32).reshape(B, T, K, H // K, h)
    v_BTK1h = v.astype(jnp.float32)[:, :, :, None]
    # With the floor inside the root the gradient is 0 at v = 0, and nothing underflows near it.
    unit_BTK1h = v_BTK1h * jax.lax.rsqrt(jnp.maximum(jnp.sum(v_BTK1h**2, -1, keepdims=True), 1e-24))
    share = jnp.sum(y_BTKGh * unit_BTK1h, -1, keepdims=True)
    return (y_BTKGh - share * unit_BTK1h).reshape(B, T, H, h).astype(y.dtype)


def finish(y: Array, v: Array | None, gate: tuple[Array, Array] | None) -> Array:
    """`api.finish` of valid arguments. Each of the two steps rounds to y's dtype, and so does the
    gate.
    """
    if v is not None:
        y = exclude_own_value(y, v)
    if gate is not None:
        logits, bias = gate
        factor_BTH = jax.nn.sigmoid(logits.astype(jnp.float32) + bias[None, None])
        y *= factor_BTH.astype(y.dtype)[..., None]
    return y
