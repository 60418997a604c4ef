"""Causal self-attention with grouped key/value heads.

Options are normalized queries and keys with a gain, rotary positions, XSA, a gate per head, and
values mixed with the first layer's values or an embedding of the token.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sngpt_kernels.epilogue.xla import finish
from sngpt_kernels.rotary import api as rotary
from sngpt_kernels.rotary.xla import apply_rotary
from sngpt_kernels.xsa import api as xsa
from sngpt_kernels.xsa import xla

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.layers import Observed, chosen_by, linear, rms_norm, weighted

logger = logging.getLogger("sngpt_jax")

KeysValues = tuple[jax.Array, jax.Array]  # [B, S, K, h] each, of one application of an attention


@dataclass(frozen=True)
class Memory:
    """The keys and values of a growing text, per application of an attention in order of execution.

    It serves one forward pass while that is traced, and collects the result in `kept`. The first
    pass covers the positions 0 … T-1. A later pass covers one position per row: each application
    writes its key and value into the `past` ones and attends to all S positions.
    """

    past: Sequence[KeysValues] = ()  # of the earlier passes; empty in the first
    position_B: jax.Array | None = None  # where a later pass writes, below S
    kept: list[KeysValues] = field(default_factory=list)

    def extend(self, k_BTKh: jax.Array, v_BTKh: jax.Array) -> KeysValues:
        """The keys and values that the next application attends to."""
        if self.past:
            rows = jnp.arange(k_BTKh.shape[0])
            k_BSKh, v_BSKh = self.past[len(self.kept)]
            k_BTKh = k_BSKh.at[rows, self.position_B].set(k_BTKh[:, 0])
            v_BTKh = v_BSKh.at[rows, self.position_B].set(v_BTKh[:, 0])
        self.kept.append((k_BTKh, v_BTKh))
        return k_BTKh, v_BTKh


class Positions(NamedTuple):
    """The T positions, as the attention of every layer needs them."""

    # cosines and sines [1 or B, T, r/2]; None: positions are already in the stream
    rotary: tuple[jax.Array, jax.Array] | None
    causal: jax.Array  # [1 or B, T, S], whether a position sees another; S = T without a past
    memory: Memory | None = None  # None: the sequence is whole


def ntk_base(base: float, width: int, length: int, trained_len: int) -> float:
    """The rotary base, raised if `length` exceeds `trained_len` (0: never), so that the slowest
    pair turns over `length` positions as far as it did over `trained_len`.

    Source: "NTK-aware scaled RoPE", https://github.com/jquesnelle/yarn.
    """
    if not trained_len or length <= trained_len:
        return base
    return base * (length / trained_len) ** (width / (width - 2))


def rotary_tables(num_positions: int, width: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [T, width/2] of the angles position · base^(-2j/width), float32.

    The host computes them in float64. Su et al. 2021, arXiv:2104.09864.
    """
    angles = np.arange(num_positions)[:, None] * base ** (-2.0 * np.arange(width // 2) / width)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def causal_mask(num_positions: int) -> jax.Array:
    """[1, T, T], true if column ≤ row. A constant would add T² bytes to a program."""
    position = jnp.arange(num_positions)
    return position[None, :, None] >= position[None, None, :]


def make_positions(config: ModelConfig, num_positions: int) -> Positions:
    """The positions of a whole sequence. Raises `ValueError` if the model takes no such length."""
    if num_positions > config.max_seq_len:
        raise ValueError(
            f"a sequence of {num_positions} tokens exceeds model.max_seq_len = {config.max_seq_len}"
        )
    causal = causal_mask(num_positions)
    if config.positions == "learned":
        return Positions(None, causal)
    width = config.rotary_dims
    base = ntk_base(config.rope_base, width, num_positions, config.rope_ntk_len)
    cos, sin = (jnp.asarray(table[None]) for table in rotary_tables(num_positions, width, base))
    return Positions((cos, sin), causal)


@functools.cache
def _announce_single_positions() -> None:
    logger.info("attention runs as xla while a text grows by single positions")


class Attention(nnx.Module):
    """The attention half of a block, on normalized input [B, T, D]; no biases.

    Gated attention: each head's output times sigmoid(W x + b), nearly 1 at the start (W = 0, b =
    4); arXiv:2505.06708. Value residual: λ₀ · the first layer's values + λ₁ · this layer's, from
    (1/2, 1/2); arXiv:2410.17897.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        D, H, K, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, h
        self.norm_eps, self.scale = config.norm_eps, h**-0.5
        self.implementation = None if config.attention == "auto" else config.attention
        self.rotary = None if config.rotary == "auto" else config.rotary
        self.exclusive = layer >= config.num_layers - config.xsa_layers
        self.qk_norm, self.gated = config.qk_norm, config.attention_gate
        self.mixes_values = config.value_residual
        self.query = nnx.Param(init.matrix(config, rngs.params(), (D, H * h)))
        self.key = nnx.Param(init.matrix(config, rngs.params(), (D, K * h)))
        self.value = nnx.Param(init.matrix(config, rngs.params(), (D, K * h)))
        self.out = nnx.Param(init.residual_output(config, rngs, (H * h, D)))
        if self.qk_norm:
            self.q_gain = nnx.Param(config.q_gain_init * jnp.ones((H,)))
        if self.gated:
            self.gate_weight = nnx.Param(jnp.zeros((D, H)))
            self.gate_bias = nnx.Param(4.0 * jnp.ones((H,)))
        if self.mixes_values:
            self.value_mix = nnx.Param(0.5 * jnp.ones((2,)))

    def project(
        self, inputs: tuple[jax.Array, ...], positions: Positions
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries [B, T, H, h] and keys [B, T, K, h] as attention takes them, raw values, and the
        gate's logits [B, T, H].

        One product computes queries, keys and values if a norm follows. A kernel writes them apart
        on its way, and the gate's logits, which are a head more of the product. Without the kernel,
        splitting the product is an extra pass where XSA uses the values twice.
        """
        matrices = [self.query[...], self.key[...], self.value[...]]
        x_BTD, H, h = inputs[0], self.num_heads, self.head_dim
        gate = self.gate_weight[...] if self.gated else None

        def heads(x_BTD: jax.Array, *matrices: jax.Array) -> jax.Array:
            return linear(x_BTD, *matrices).reshape(*x_BTD.shape[:2], -1, self.head_dim)

        if self.qk_norm and positions.rotary:
            with chosen_by("rotary"):
                chosen = rotary.choose(x_BTD.dtype, self.head_dim, self.rotary)
            if chosen != "xla":
                values: tuple[int, ...] = (self.num_kv_heads,)
                if gate is not None and not isinstance(gate, Observed) and H <= h:
                    matrices.append(jnp.pad(gate, ((0, 0), (0, h - H))))
                    values += (1,)
                q_BTHh, k_BTKh, v_BTKh, *rest = rotary.prepare(
                    heads(x_BTD, *matrices),
                    self.q_gain[...],
                    *positions.rotary,
                    eps=self.norm_eps,
                    values=values,
                    implementation=self.rotary,
                )
                if rest:
                    return q_BTHh, k_BTKh, v_BTKh, rest[0][:, :, 0, :H]
                logits_BTH = None if gate is None else linear(inputs[2], gate)
                return q_BTHh, k_BTKh, v_BTKh, logits_BTH
        if self.exclusive or not self.qk_norm:
            q_BTHh, k_BTKh, v_BTKh = map(heads, inputs, matrices)
        else:
            ends = (H, H + self.num_kv_heads)
            q_BTHh, k_BTKh, v_BTKh = jnp.split(heads(x_BTD, *matrices), ends, axis=2)
        if self.qk_norm:
            q_BTHh, k_BTKh = rms_norm(q_BTHh, self.norm_eps), rms_norm(k_BTKh, self.norm_eps)
        if positions.rotary:
            q_BTHh = apply_rotary(q_BTHh, positions.rotary)
            k_BTKh = apply_rotary(k_BTKh, positions.rotary)
        if self.qk_norm:
            q_BTHh = weighted(self.q_gain[...][None, None, :, None], q_BTHh)
        return q_BTHh, k_BTKh, v_BTKh, None if gate is None else linear(inputs[2], gate)

    def __call__(
        self, x_BTD: jax.Array, positions: Positions, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The output [B, T, D], and the values; arguments are those of `heads`."""
        y_BTE, v_BTKh = self.heads(x_BTD, positions, **options)
        return linear(y_BTE, self.out[...]), v_BTKh

    def heads(
        self,
        x_BTD: jax.Array,
        positions: Positions,
        *,
        copies: tuple[jax.Array, ...] = (),
        added_value: jax.Array | None = None,
        first_value: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The heads side by side [B, T, E], which `out` takes, and the values [B, T, K, h].

        A kernel that gives two `copies` of x, too, adds the gradients of the products that read
        them. `added_value` is added to the values; `first_value` are the first layer's values.
        """
        inputs = (x_BTD, *copies) if copies else (x_BTD,) * 3
        q_BTHh, k_BTKh, v_BTKh, logits_BTH = self.project(inputs, positions)
        if added_value is not None:
            v_BTKh += added_value
        if self.mixes_values and first_value is not None:
            first, own = self.value_mix[...]
            v_BTKh = weighted(first, first_value) + weighted(own, v_BTKh)
        k_BSKh, v_BSKh = k_BTKh, v_BTKh
        if positions.memory:
            k_BSKh, v_BSKh = positions.memory.extend(k_BTKh, v_BTKh)
        chex.assert_shape(positions.causal, (None, x_BTD.shape[1], k_BSKh.shape[1]))
        gate = None if logits_BTH is None else (logits_BTH, self.gate_bias[...])
        if k_BSKh is k_BTKh:
            with chosen_by("attention"):
                y_BTHh = xsa.attention(
                    q_BTHh,
                    k_BTKh,
                    v_BTKh,
                    exclusive=self.exclusive,
                    scale=self.scale,
                    gate=gate,
                    implementation=self.implementation,
                )
        else:
            _announce_single_positions()
            mask = positions.causal
            y_BTHh = xla.masked_attention(q_BTHh, k_BSKh, v_BSKh, mask, scale=self.scale)
            y_BTHh = finish(y_BTHh, v_BTKh if self.exclusive else None, gate)
        return y_BTHh.reshape(*x_BTD.shape[:2], -1), v_BTKh
