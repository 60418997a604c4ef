"""Tiles of Pallas Triton kernels whose widths are no powers of two, and whose rows may be too few.

Triton's tiles are powers of two wide. So a row of an array is a list of tiles, one per span.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclass(frozen=True)
class Config:
    """What one program takes of kernels over the positions of all heads, and what runs it."""

    rows: int = 32  # positions; a power of two
    num_warps: int = 4

    @classmethod
    def heuristic(cls) -> "Config":
        """A thread of the four warps loads 16 bytes of each half of a head of 64 bfloat16."""
        return cls()


def spans(start: int, width: int) -> Iterator[slice]:
    """The columns from `start` in parts whose widths are powers of two, widest first."""
    while width:
        part = 1 << (width.bit_length() - 1)
        yield slice(start, start + part)
        start, width = start + part, width - part


def exist(length: int, rows: int, axis: int = 0) -> Array | None:
    """Which of this program's `rows` exist, [rows, 1]; None means all.

    The programs along that axis of the grid share `length` rows.
    """
    if length % rows == 0:
        return None
    return pl.program_id(axis) * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < length


def read(tile: Any, existing: Array | None) -> Array:
    """The tile, with 0 in the rows that do not exist; `existing` is None if all do."""
    if existing is None:
        return plgpu.load(tile)
    return plgpu.load(tile, mask=jnp.broadcast_to(existing, tile.shape), other=0.0)


def load(tile: Any, existing: Array | None) -> Array:
    """`read` as float32."""
    return read(tile, existing).astype(jnp.float32)


def store(tile: Any, values: Array, existing: Array | None) -> None:
    """Writes the tile's rows that exist, rounded to its dtype."""
    mask = None if existing is None else jnp.broadcast_to(existing, values.shape)
    plgpu.store(tile, values.astype(tile.dtype), mask=mask)


def dot(a: list[Array], b: list[Array]) -> Array:
    """The products of the rows of two lists of tiles, [rows, 1]."""
    sums = [jnp.sum(x * y, axis=1, keepdims=True) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, sums)
