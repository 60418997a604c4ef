"""The operation in plain jax: any accelerator and the CPU. The scores [B, H, T, T] are
materialized.
"""

import functools

import jax
import jax.numpy as jnp


def exclude_own_value(y: jax.Array, v: jax.Array) -> jax.Array:
    """y - ⟨y, v̂⟩ v̂ with v̂ = v / max(|v|, 1e-12): what a head has gathered, without the
    direction of its own value.

    y [B, T, H, h], v [B, T, K, h]: that of the same position and of the head's key/value group ⌊i
    · K / H⌋. In float32; returns y's dtype. Exclusive self-attention (XSA), arXiv:2603.09078.
    """
    B, T, H, h = y.shape
    K = v.shape[2]
    y_BTKGh = y.astype(jnp.float32).reshape(B, T, K, H // K, h)
    v_BTK1h = v.astype(jnp.float32)[:, :, :, None]
    # the floor is inside of the root, where the gradient is 0 at v = 0 and nothing underflows near
    # it
    unit_BTK1h = v_BTK1h * jax.lax.rsqrt(jnp.maximum(jnp.sum(v_BTK1h**2, -1, keepdims=True), 1e-24))
    share = jnp.sum(y_BTKGh * unit_BTK1h, -1, keepdims=True)
    return (y_BTKGh - share * unit_BTK1h).reshape(B, T, H, h).astype(y.dtype)


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float
) -> jax.Array:
    """softmax(scale · q kᵀ) v over the keys that `mask` lets each query see, with a float32
    softmax.

    q [B, T, H, h]; k, v [B, S, K, h]; mask [1 or B, T, S], true where position t of the queries
    sees position s of the keys, of which each query must see one. Query head i uses key/value head
    ⌊i · K / H⌋ (grouped-query attention, arXiv:2305.13245). Returns [B, T, H, h].
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    q_BTKGh = q.reshape(B, T, K, H // K, h) * scale
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1).astype(
        v.dtype
    )
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, H, h)


def _rows(x_BTHh: jax.Array, groups: int) -> jax.Array:
    """[B, T, H, h] as [B, K, R, h]: the R = T · H/K queries that share a key/value head, by
    position.
    """
    B, T, H, h = x_BTHh.shape
    return (
        x_BTHh.reshape(B, T, groups, H // groups, h)
        .swapaxes(1, 2)
        .reshape(B, groups, T * (H // groups), h)
    )


def _heads(x_BKRh: jax.Array, T: int) -> jax.Array:
    """The inverse of `_rows`."""
    B, K, R, h = x_BKRh.shape
    return x_BKRh.reshape(B, K, T, R // T, h).swapaxes(1, 2).reshape(B, T, K * (R // T), h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """`masked_attention` of whole sequences under a causal mask, with a gradient of its own.

    What is kept for the gradient is e = exp(score - the row's largest) and its sums, so that
    nothing as large as the scores is divided by them. And no product takes the scores transposed:
    on a CPU the copy costs more than the product. The gradients of k and v are [h, T] instead,
    products of small transposed arrays with the scores as they lie.
    """
    return _causal_forward(q, k, v, scale)[0]


def _causal_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    T, K = k.shape[1:3]
    q_BKRh, k_BKTh, v_BKTh = _rows(q, K) * scale, _rows(k, K), _rows(v, K)
    scores = jnp.einsum("bkrh,bksh->bkrs", q_BKRh, k_BKTh, preferred_element_type=jnp.float32)
    # the mask is made on the device: as a constant it would stand in the program, T² bytes
    of_row = jnp.arange(q_BKRh.shape[2]) // (q_BKRh.shape[2] // T)
    seen = of_row[None, None, :, None] >= jnp.arange(T)[None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    e_BKRT = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    sum_BKR1 = jnp.sum(e_BKRT, axis=-1, keepdims=True)
    e_BKRT = e_BKRT.astype(v.dtype)
    y_BKRh = (
        jnp.einsum("bkrs,bksh->bkrh", e_BKRT, v_BKTh, preferred_element_type=jnp.float32) / sum_BKR1
    )
    y_BKRh = y_BKRh.astype(q.dtype)
    return _heads(y_BKRh, T), (q_BKRh, k_BKTh, v_BKTh, y_BKRh, e_BKRT, sum_BKR1)


def _causal_backward(
    scale: float, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BKRh, k_BKTh, v_BKTh, y_BKRh, e_BKRT, sum_BKR1 = kept
    T, dtype = k_BKTh.shape[2], dy.dtype
    # by the sums of the softmax here, and so not over all scores below
    dy_BKRh = _rows(dy, k_BKTh.shape[1]).astype(jnp.float32) / sum_BKR1
    # a sum by a product with ones: a CPU's compiler would fuse a sum with the large product below,
    # and slow that down
    ones_h1 = jnp.ones((dy.shape[-1], 1), jnp.float32)
    own_BKR1 = jnp.matmul(dy_BKRh * y_BKRh, ones_h1, precision=jax.lax.Precision.HIGHEST)
    dy_BKRh = dy_BKRh.astype(dtype)
    dv_BKhT = jnp.einsum("bkhr,bkrs->bkhs", dy_BKRh.mT, e_BKRT, preferred_element_type=jnp.float32)
    de_BKRT = jnp.einsum("bkrh,bkhs->bkrs", dy_BKRh, v_BKTh.mT, preferred_element_type=jnp.float32)
    ds_BKRT = (e_BKRT * (de_BKRT - own_BKR1)).astype(dtype)
    dq_BKRh = scale * jnp.einsum(
        "bkrs,bksh->bkrh", ds_BKRT, k_BKTh, preferred_element_type=jnp.float32
    )
    dk_BKhT = jnp.einsum("bkhr,bkrs->bkhs", q_BKRh.mT, ds_BKRT, preferred_element_type=jnp.float32)
    dk, dv = (jnp.transpose(x_BKhT, (0, 3, 1, 2)).astype(dtype) for x_BKhT in (dk_BKhT, dv_BKhT))
    return _heads(dq_BKRh, T).astype(dtype), dk, dv


causal_attention.defvjp(_causal_forward, _causal_backward)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, exclusive: bool, scale: float) -> jax.Array:
    """See `api.attention`."""
    y = causal_attention(q, k, v, scale)
    return exclude_own_value(y, v) if exclusive else y
