"""The common parts of the Pallas Triton kernels of attention: block sizes, tiles and arithmetic.

Products of bfloat16 are exact and accumulated in float32. A product of float32 is three TF32
products, with an error of about 2^-22 of the terms.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels import dispatch
from sngpt_kernels.launch import launch
from sngpt_kernels.xsa.api import tuned_entry

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Blocks:
    """The tile of scores of one kernel, and what runs it."""

    queries: int  # per tile; a power of two, at least 16
    keys: int  # per tile, likewise
    num_warps: int
    num_stages: int  # of the loop's pipeline: the tiles in flight


@dataclass(frozen=True)
class Config:
    """The blocks of the three kernels that pass over scores."""

    forward: Blocks
    keys_values: Blocks  # the gradients of k and v
    queries: Blocks  # the gradient of q

    @classmethod
    def heuristic(cls, dtype: jnp.dtype, head_size: int) -> "Config":
        """The largest tiles that the forward kernel, compiled for an H100, keeps in registers."""
        if dtype == jnp.float32 and head_size > 64:
            return cls(Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2), Blocks(32, 16, 4, 2))
        if dtype == jnp.float32:
            return cls(Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2), Blocks(64, 32, 4, 2))
        if head_size <= 64:
            return cls(Blocks(128, 64, 4, 3), Blocks(64, 128, 8, 3), Blocks(128, 64, 8, 3))
        return cls(Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2), Blocks(128, 64, 8, 2))

    @classmethod
    def of(cls, dtype: jnp.dtype, length: int, head_size: int) -> "Config":
        """The entry of the device's table, or `heuristic` if it has none."""
        entry = tuned_entry(dispatch.current_device(), dtype, length, head_size)
        if "config" in entry:
            return cls(**{kernel: Blocks(**blocks) for kernel, blocks in entry["config"].items()})
        return cls.heuristic(dtype, head_size)


@dataclass(frozen=True)
class Problem:
    """The static arguments of one call, for all its kernels."""

    batch: int
    length: int  # T
    heads: int
    groups: int  # K, the key/value heads
    head_size: int
    scale: float
    dtype: Any
    interpret: bool

    @property
    def width(self) -> int:
        """The columns of a tile: the head size, padded to a power of two that a dot takes."""
        return max(16, pl.next_power_of_2(self.head_size))

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def dot(self, a: Array, b: Array, trans_b: bool = False) -> Array:
        """a [n, k] times b [k, m], or b [m, k] if `trans_b`: float32 [n, m]."""
        exact = self.interpret or self.dtype == jnp.bfloat16
        precision = None if exact else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return plgpu.dot(a, b, trans_b=trans_b, precision=precision)

    def weights(self, scores: Array, rows: Array) -> Array:
        """2^(scale · log2 e · scores - rows) with `rows` [n, 1] or [1, n]; 0 below 2^-126."""
        # two instructions, where the compiler would make six
        scale = jnp.full_like(scores, self.scale * LOG2_E)
        rows = jnp.broadcast_to(rows, scores.shape)
        if self.interpret:
            return jnp.exp2(scores * scale - rows)
        (weights,) = plgpu.elementwise_inline_asm(
            "{ .reg .f32 t; neg.f32 t, $3; fma.rn.ftz.f32 t, $1, $2, t; ex2.approx.ftz.f32 $0,"
            " t; }",
            args=[scores, scale, rows],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[ShapeDtypeStruct(scores.shape, scores.dtype)],
        )
        return weights

    def exists(self, start: Array | int, rows: int, ragged: bool = True) -> Array | None:
        """Which elements of the tile [rows, width] from row `start` exist; None means all."""
        shape, mask = (rows, self.width), None
        if ragged and self.length % rows:
            mask = start + lax.broadcasted_iota(jnp.int32, shape, 0) < self.length
        if self.width > self.head_size:
            columns = lax.broadcasted_iota(jnp.int32, shape, 1) < self.head_size
            mask = columns if mask is None else mask & columns
        return mask

    def rows_exist(self, start: Array | int, rows: int, ragged: bool = True) -> Array | None:
        """`exists` for a tile [rows] of one number per row."""
        if not ragged or self.length % rows == 0:
            return None
        return start + lax.iota(jnp.int32, rows) < self.length

    def launch(
        self,
        name: str,
        kernel: Any,
        blocks: Blocks,
        grid: tuple[int, int],
        arrays: Sequence[Array],
        results: Any,
        *,
        dots: int,
        **specs: Any,
    ) -> Any:
        """`launch` over grid and batch of a kernel with `dots` products of q kᵀ's size."""
        scores = self.batch * self.heads * self.length * (self.length + 1) // 2
        return launch(
            name,
            functools.partial(kernel, problem=self, blocks=blocks),
            (*grid, self.batch),
            arrays,
            results,
            flops=2 * dots * scores * self.head_size,
            transcendentals=scores if dots else 0,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
            interpret=self.interpret,
            **specs,
        )

    def query_specs(self, blocks: Blocks) -> tuple[int, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
        """For a kernel with one tile of queries per program on the grid (programs, heads, batch).

        Returns the number of programs and the specs of a tile [B, T, H, h], of one number per row
        [B, H, T], and of all keys or values [B, T, K, h] of a head. The longest rows go first.
        """
        programs, G = pl.cdiv(self.length, blocks.queries), self.heads_per_group
        tile = pl.BlockSpec(
            (None, blocks.queries, None, self.width),
            lambda i, head, b: (b, programs - 1 - i, head, 0),
        )
        row = pl.BlockSpec(
            (None, None, blocks.queries), lambda i, head, b: (b, head, programs - 1 - i)
        )
        whole = pl.BlockSpec(
            (None, self.length, None, self.width), lambda i, head, b: (b, 0, lax.div(head, G), 0)
        )
        return programs, tile, row, whole

    def key_tiles(self, start: Array, blocks: Blocks) -> tuple[Array, Array]:
        """(before, through): the queries of a tile from row `start` see all keys of the tiles below
        `before`, and part of the keys of the tiles before … through - 1.
        """
        before = lax.div(start + 1, blocks.keys)
        last = jnp.minimum(start + blocks.queries, self.length)
        return before, lax.div(last + blocks.keys - 1, blocks.keys)


def load(ref: Any, mask: Array | None, other: float = 0.0) -> Array:
    """The ref's whole tile, with `other` where `mask` is false."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=other)


def is_causal(
    query_start: Array | int, key_start: Array | int, shape: tuple[int, int], key_axis: int
) -> Array:
    """Which keys the queries see in a tile of scores of that shape."""
    keys = key_start + lax.broadcasted_iota(jnp.int32, shape, key_axis)
    queries = query_start + lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis)
    return queries >= keys
