"""What the Pallas Triton kernels of attention have in common: how they are cut, the tiles they
load, their arithmetic.

Products of bfloat16 are exact and accumulated in float32. Those of float32 are three TF32 products
each (the tensor cores' format has 11 bits of a float32's 24, two of them 22), an error of about
2^-22 of the terms.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels import dispatch
from sngpt_kernels.xsa.api import table_key

LOG2_E = math.log2(math.e)
MIN_SQUARE = 1e-24  # of |v|: the square of the norm's floor


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut: the tile of scores that a program works on at a time, and what runs
    it.
    """

    queries: int  # powers of two, at least 16
    keys: int
    num_warps: int
    num_stages: int  # of the loop's pipeline: how many tiles are in flight

    @property
    def compiler_params(self) -> plgpu.CompilerParams:
        return plgpu.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class Config:
    """The blocks of the three kernels that pass over scores."""

    forward: Blocks
    keys_values: Blocks  # the gradients of k and v
    queries: Blocks  # the gradient of q

    @classmethod
    def heuristic(cls, dtype: jnp.dtype, head_size: int) -> "Config":
        """Without a measurement: the largest tiles that the forward kernel keeps in registers,
        compiled for an H100.
        """
        if dtype == jnp.float32 and head_size > 64:
            return cls(Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2), Blocks(32, 16, 4, 2))
        if dtype == jnp.float32:
            return cls(Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2), Blocks(64, 32, 4, 2))
        if head_size <= 64:
            return cls(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3))
        return cls(Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2), Blocks(128, 64, 8, 2))

    @classmethod
    def of(cls, dtype: jnp.dtype, length: int, head_size: int, exclusive: bool) -> "Config":
        """That of the device's table, where it has one, else `heuristic`."""
        key = table_key(dtype, length, head_size, exclusive)
        entry = dispatch.tuned("sngpt_kernels.xsa", dispatch.current_device().kind).get(key, {})
        if "config" in entry:
            return cls(**{kernel: Blocks(**blocks) for kernel, blocks in entry["config"].items()})
        return cls.heuristic(dtype, head_size)


@dataclass(frozen=True)
class Problem:
    """What is computed, for all kernels of one call. Static."""

    batch: int
    length: int  # T
    heads: int
    groups: int  # K, the key/value heads
    head_size: int
    exclusive: bool
    scale: float
    dtype: Any
    interpret: bool

    @property
    def width(self) -> int:
        """Of a tile: the head size, filled up with zeros to a power of two that a dot takes."""
        return max(16, pl.next_power_of_2(self.head_size))

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def dot(self, a: jax.Array, b: jax.Array, trans_b: bool = False) -> jax.Array:
        """a [n, k] times b [k, m], or b [m, k] where `trans_b`: float32 [n, m]; of float32 as
        three TF32 products.
        """
        precision = (
            None
            if self.interpret or self.dtype == jnp.bfloat16
            else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        )
        return plgpu.dot(a, b, trans_b=trans_b, precision=precision)

    def weights(self, scores: jax.Array, rows: jax.Array) -> jax.Array:
        """2^(scale · log2 e · scores - rows) with `rows` [n, 1] or [1, n], results below 2^-126 as
        0.

        As two instructions: the compiler would make six of them, not contracting the product and
        the difference, and rescaling around the power for the smallest results.
        """
        scale, rows = (
            jnp.full_like(scores, self.scale * LOG2_E),
            jnp.broadcast_to(rows, scores.shape),
        )
        if self.interpret:
            return jnp.exp2(scores * scale - rows)
        (weights,) = plgpu.elementwise_inline_asm(
            "{ .reg .f32 t; neg.f32 t, $3; fma.rn.ftz.f32 t, $1, $2, t; ex2.approx.ftz.f32 $0,"
            " t; }",
            args=[scores, scale, rows],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, scores.dtype)],
        )
        return weights

    def exists(self, start: jax.Array | int, rows: int, ragged: bool = True) -> jax.Array | None:
        """Which elements of the tile [rows, width] from row `start` of T exist; None: all, as
        always where not `ragged`.
        """
        shape, mask = (rows, self.width), None
        if ragged and self.length % rows:
            mask = start + lax.broadcasted_iota(jnp.int32, shape, 0) < self.length
        if self.width > self.head_size:
            columns = lax.broadcasted_iota(jnp.int32, shape, 1) < self.head_size
            mask = columns if mask is None else mask & columns
        return mask

    def rows_exist(
        self, start: jax.Array | int, rows: int, ragged: bool = True
    ) -> jax.Array | None:
        """The same of one number a row, [rows]."""
        if not ragged or self.length % rows == 0:
            return None
        return start + lax.iota(jnp.int32, rows) < self.length

    def cost(self, dots: int, arrays: list[Any]) -> pl.CostEstimate:
        """Of a kernel with so many products of the size of q kᵀ (0: it sees no scores), and these
        arguments and results.
        """
        scores = self.batch * self.heads * self.length * (self.length + 1) // 2
        size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        powers = scores if dots else 0
        return pl.CostEstimate(
            flops=2 * dots * scores * self.head_size, transcendentals=powers, bytes_accessed=size
        )


def load(ref: Any, mask: jax.Array | None, other: float = 0.0) -> jax.Array:
    """The ref's tile, of its shape, with `other` where the mask says that there is nothing."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=other)


def is_causal(
    query_start: jax.Array | int, key_start: jax.Array | int, shape: tuple[int, int], key_axis: int
) -> jax.Array:
    """Which keys of a tile of scores of that shape its queries see."""
    keys = key_start + lax.broadcasted_iota(jnp.int32, shape, key_axis)
    queries = query_start + lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis)
    return queries >= keys


def inverse_norm(v: jax.Array) -> jax.Array:
    """1 / max(|v|, 1e-12) of the rows of v [rows, h] float32."""
    return lax.rsqrt(jnp.maximum(jnp.sum(v * v, axis=1), MIN_SQUARE))
