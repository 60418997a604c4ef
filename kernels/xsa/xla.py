"""The operation in plain jax: any accelerator and the CPU. The scores [B, H, T, T] are materialized."""

import jax
import jax.numpy as jnp


def exclude_own_value(y: jax.Array, v: jax.Array) -> jax.Array:
    """y - ⟨y, v̂⟩ v̂ with v̂ = v / max(|v|, 1e-12): what a head has gathered, without the direction of its own value.

    y [B, T, H, h], v [B, T, K, h]: that of the same position and of the head's key/value group ⌊i · K / H⌋. In float32;
    returns y's dtype. Exclusive self-attention (XSA), arXiv:2603.09078.
    """
    B, T, H, h = y.shape
    K = v.shape[2]
    y_BTKGh = y.astype(jnp.float32).reshape(B, T, K, H // K, h)
    v_BTK1h = v.astype(jnp.float32)[:, :, :, None]
    # the floor is inside of the root, where the gradient is 0 at v = 0 and nothing underflows near it
    unit_BTK1h = v_BTK1h * jax.lax.rsqrt(jnp.maximum(jnp.sum(v_BTK1h**2, -1, keepdims=True), 1e-24))
    share = jnp.sum(y_BTKGh * unit_BTK1h, -1, keepdims=True)
    return (y_BTKGh - share * unit_BTK1h).reshape(B, T, H, h).astype(y.dtype)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float) -> jax.Array:
    """softmax(scale · q kᵀ) v over the keys that `mask` lets each query see, with a float32 softmax.

    q [B, T, H, h]; k, v [B, S, K, h]; mask [1 or B, T, S], true where position t of the queries sees position s of the
    keys, of which each query must see one. Query head i uses key/value head ⌊i · K / H⌋ (grouped-query attention,
    arXiv:2305.13245). Returns [B, T, H, h].
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    q_BTKGh = q.reshape(B, T, K, H // K, h) * scale
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, H, h)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, exclusive: bool, scale: float) -> jax.Array:
    """See `api.attention`."""
    position = jnp.arange(q.shape[1])  # the mask is made on the device: as a constant it would stand in the program, T² bytes
    y = masked_attention(q, k, v, position[None, :, None] >= position[None, None, :], scale=scale)
    return exclude_own_value(y, v) if exclusive else y
