"""Attention in plain jax, for any device."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def masked_attention(q: Array, k: Array, v: Array, mask: Array, *, scale: float) -> Array:
    """softmax(scale · q kᵀ) v over the keys that each query sees, with a float32 softmax.

    q is [B, T, H, h], k and v [B, S, K, h]. mask [1 or B, T, S] is true where query t sees key s.
    Each query must see a key. Heads are grouped as in `api.attention`. Returns [B, T, H, h].
    """
    B, T, H, h = q.shape
    K = k.shape[2]
    q_BTKGh = q.reshape(B, T, K, H // K, h) * scale
    scores = _product("btkgh,bskh->bkgts", q_BTKGh, k)
    scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, H, h)


def _rows(x_BTHh: Array, groups: int) -> Array:
    """[B, T, H, h] as [B, K, R, h]: the R = T · H/K queries of a key/value head, by position."""
    B, T, H, h = x_BTHh.shape
    x_BKTGh = x_BTHh.reshape(B, T, groups, H // groups, h).swapaxes(1, 2)
    return x_BKTGh.reshape(B, groups, T * (H // groups), h)


def _heads(x_BKRh: Array, T: int) -> Array:
    """The inverse of `_rows`."""
    B, K, R, h = x_BKRh.shape
    return x_BKRh.reshape(B, K, T, R // T, h).swapaxes(1, 2).reshape(B, T, K * (R // T), h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def causal_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """`masked_attention` of whole sequences under a causal mask, with a gradient of its own.

    The backward pass divides no array of the scores' size. No product takes the scores transposed,
    because on a CPU that copy costs more than the product.
    """
    return _causal_forward(q, k, v, scale)[0]


def _causal_forward(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, tuple[Array, ...]]:
    T, K = k.shape[1:3]
    q_BKRh, k_BKTh, v_BKTh = _rows(q, K) * scale, _rows(k, K), _rows(v, K)
    scores = _product("bkrh,bksh->bkrs", q_BKRh, k_BKTh)
    # The device makes the mask. As a constant it would add T² bytes to the program.
    of_row = jnp.arange(q_BKRh.shape[2]) // (q_BKRh.shape[2] // T)
    seen = of_row[None, None, :, None] >= jnp.arange(T)[None, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    e_BKRT = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    sum_BKR1 = jnp.sum(e_BKRT, axis=-1, keepdims=True)
    e_BKRT = e_BKRT.astype(v.dtype)
    y_BKRh = _product("bkrs,bksh->bkrh", e_BKRT, v_BKTh)
    y_BKRh = (y_BKRh / sum_BKR1).astype(q.dtype)
    return _heads(y_BKRh, T), (q_BKRh, k_BKTh, v_BKTh, y_BKRh, e_BKRT, sum_BKR1)


def _causal_backward(
    scale: float, kept: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    q_BKRh, k_BKTh, v_BKTh, y_BKRh, e_BKRT, sum_BKR1 = kept
    T, dtype = k_BKTh.shape[2], dy.dtype
    # The division by the softmax's sums is here, and not over all scores below.
    dy_BKRh = _rows(dy, k_BKTh.shape[1]).astype(jnp.float32) / sum_BKR1
    # A CPU's compiler would fuse a plain sum with the large product below and slow it down.
    ones_h1 = jnp.ones((dy.shape[-1], 1), jnp.float32)
    own_BKR1 = jnp.matmul(dy_BKRh * y_BKRh, ones_h1, precision=jax.lax.Precision.HIGHEST)
    dy_BKRh = dy_BKRh.astype(dtype)
    dv_BKhT = _product("bkhr,bkrs->bkhs", dy_BKRh.mT, e_BKRT)
    de_BKRT = _product("bkrh,bkhs->bkrs", dy_BKRh, v_BKTh.mT)
    ds_BKRT = (e_BKRT * (de_BKRT - own_BKR1)).astype(dtype)
    dq_BKRh = scale * _product("bkrs,bksh->bkrh", ds_BKRT, k_BKTh)
    dk_BKhT = _product("bkhr,bkrs->bkhs", q_BKRh.mT, ds_BKRT)
    dk, dv = (jnp.transpose(x_BKhT, (0, 3, 1, 2)).astype(dtype) for x_BKhT in (dk_BKhT, dv_BKhT))
    return _heads(dq_BKRh, T).astype(dtype), dk, dv


causal_attention.defvjp(_causal_forward, _causal_backward)
