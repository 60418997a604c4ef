"""Causal self-attention: grouped key/value heads, normalized queries and keys with a gain, rotary positions."""

import functools
import logging
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.layers import compute_dtype, platform, rms_norm

logger = logging.getLogger("sngpt_jax")

Implementation = Literal["xla", "cudnn"]
RotaryTables = tuple[np.ndarray, np.ndarray]


def rotary_tables(num_positions: int, width: int, base: float) -> RotaryTables:
    """Cosines and sines [T, width/2] of the angles position · base^(-2j/width), as float32 constants.

    Made in float64 on the host while tracing, once for all layers. Su et al. 2021, arXiv:2104.09864.
    """
    angles = np.arange(num_positions)[:, None] * base ** (-2.0 * np.arange(width // 2) / width)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rotary(x_BTHh: jax.Array, tables: RotaryTables) -> jax.Array:
    """Turns each pair (j, j + h/2) of a head by its position's angle, in float32; returns x's dtype."""
    cos, sin = (jnp.asarray(table)[None, :, None, :] for table in tables)
    x1, x2 = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1).astype(x_BTHh.dtype)


def attend_xla(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
    """Causal softmax(q kᵀ / √h) v in plain einsums with a float32 softmax; the scores [B, H, T, T] are materialized.

    Query head i uses key/value head ⌊i · K / H⌋ (grouped-query attention, arXiv:2305.13245). Returns [B, T, H, h].
    """
    B, T, H, h = q_BTHh.shape
    K = k_BTKh.shape[2]
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h) * h**-0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BTKh, preferred_element_type=jnp.float32)
    position = jnp.arange(T)  # a mask made on the device: as a constant it would stand in the program once a layer
    causal = (position[:, None] >= position[None, :])[None, None, None]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(v_BTKh.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v_BTKh).reshape(B, T, H, h)


def attend_cudnn(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
    """The same operation by cuDNN's fused attention: NVIDIA GPUs, bfloat16; nothing of size T² is stored."""
    return jax.nn.dot_product_attention(q_BTHh, k_BTKh, v_BTKh, is_causal=True, implementation="cudnn")


ATTEND = {"xla": attend_xla, "cudnn": attend_cudnn}


@functools.cache
def choose_implementation(requested: str, platform: str, dtype: str, head_dim: int) -> Implementation:
    """The attention that runs for `requested` on this platform, dtype and head size; logs the choice and its reason once."""
    if requested != "auto":
        choice, reason = requested, "asked for by model.attention"
    elif platform != "cuda" or dtype != "bfloat16":
        choice, reason = "xla", f"{dtype} on {platform}; cudnn serves bfloat16 on an NVIDIA GPU"
    elif head_dim % 8 or head_dim > 128:
        choice, reason = "xla", f"head size {head_dim}; cudnn serves multiples of 8 up to 128"
    else:
        choice, reason = "cudnn", "bfloat16 on an NVIDIA GPU"
    logger.info("attention: %s (%s)", choice, reason)
    return "cudnn" if choice == "cudnn" else "xla"


class Attention(nnx.Module):
    """The attention half of a block, input [B, T, D] already normalized; no biases; the output projection starts at zero."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, H, K, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.norm_eps = H, K, config.norm_eps
        dtype = compute_dtype(config)
        self.implementation = choose_implementation(config.attention, platform(), dtype.name, h)
        self.query = nnx.Param(init.fan_in_uniform(rngs.params(), (D, H * h)))
        self.key = nnx.Param(init.fan_in_uniform(rngs.params(), (D, K * h)))
        self.value = nnx.Param(init.fan_in_uniform(rngs.params(), (D, K * h)))
        self.out = nnx.Param(init.zeros((H * h, D)))
        self.q_gain = nnx.Param(config.q_gain_init * init.ones((H,)))

    def __call__(self, x_BTD: jax.Array, rotary: RotaryTables) -> jax.Array:
        B, T, _ = x_BTD.shape
        chex.assert_shape(rotary, (T, self.query.shape[1] // self.num_heads // 2))

        def heads(weight: nnx.Param, count: int) -> jax.Array:
            return (x_BTD @ weight[...].astype(x_BTD.dtype)).reshape(B, T, count, -1)

        q_BTHh = apply_rotary(rms_norm(heads(self.query, self.num_heads), self.norm_eps), rotary)
        q_BTHh = q_BTHh * self.q_gain[...].astype(x_BTD.dtype)[None, None, :, None]
        k_BTKh = apply_rotary(rms_norm(heads(self.key, self.num_kv_heads), self.norm_eps), rotary)
        v_BTKh = heads(self.value, self.num_kv_heads)
        y_BTHh = ATTEND[self.implementation](q_BTHh, k_BTKh, v_BTKh)
        return y_BTHh.reshape(B, T, -1) @ self.out[...].astype(x_BTD.dtype)
