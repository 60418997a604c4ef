"""Parts of the Triton kernels that sum signed atoms, Σ_a c_a v_(f_a): block sizes, tiles, decoding.

A program has a tile [32, T, W] of T tokens of width d = 32·W. Element (i, t, j) belongs to point
i·W + j of token t. The default layout spreads the last axes over the lanes and keeps axis 0 inside
a thread. So a thread meets 32 points whose signs are the bits of one word of `sign_words`, and the
threads of a warp read neighbouring words.
"""

import functools
import operator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels import dispatch
from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.api import tuned_entry
from sngpt_kernels.cayley.dictionary import Levels
from sngpt_kernels.cayley.folding import DIGIT_BITS, sign_words
from sngpt_kernels.cayley.xla import ID_MASK

WORD = 32  # points per thread
THREADS = 128  # per program of the forward kernel, four warps


@dataclass(frozen=True)
class Config:
    """Block sizes. The threads of a program share its columns: tokens · d / 32."""

    forward_tokens: int
    forward_warps: int
    bias_features: int  # per program of the kernel that adds up the bias gradient
    bias_lanes: int  # per feature of that kernel
    bias_warps: int

    @classmethod
    def heuristic(cls, d: int) -> "Config":
        """One column per thread, with at most 16 tokens so that narrow tokens leave programs."""
        tokens = min(max(1, THREADS * WORD // d), 16)
        return cls(tokens, 4, bias_features=4, bias_lanes=128, bias_warps=1)

    @classmethod
    def of(cls, dtype: jnp.dtype, levels: Levels) -> "Config":
        """The entry of the device's table, or `heuristic` if it has none."""
        entry = tuned_entry(dispatch.current_device(), dtype, levels)
        return cls(**entry["config"]) if "config" in entry else cls.heuristic(2 ** levels[0][0])


def table(d: int, features: int) -> np.ndarray:
    """`sign_words` of the features below `features`, a power of two, at all d points: int32."""
    return sign_words(dictionary.trace_masks(d), features.bit_length() - 1)


def words(table_ref: Any, ids: Array, columns: Array) -> Array:
    """The words `columns` of the features `ids`, int32 of one shape, from a ref to `sign_words`."""
    digits = range(table_ref.shape[0])
    rows = [table_ref[c, (ids >> DIGIT_BITS * c) & (2**DIGIT_BITS - 1), columns] for c in digits]
    return functools.reduce(operator.xor, rows)


def sign_bits(table_ref: Any, ids: Array, columns: Array) -> Array:
    """`words` as masks [32, ...] int32 for `flip`: bit i of the word as the sign bit."""
    of_ids = words(table_ref, ids, columns)
    shift = 31 - lax.broadcasted_iota(jnp.int32, (32, *ids.shape), 0)
    return (of_ids[None] << shift) & jnp.int32(-(2**31))


def flip(values: Array, sign_bits: Array) -> Array:
    """float32 values with flipped signs where `sign_bits`, of one shape, has its sign bit set."""
    flipped = lax.bitcast_convert_type(values, jnp.int32) ^ sign_bits
    return lax.bitcast_convert_type(flipped, jnp.float32)


@dataclass(frozen=True)
class Tile:
    """The places of a program's points."""

    row: Array  # int32 [T, W]: the token, at most the last one
    column: Array  # int32 [T, W]: j
    point: Array  # int32 [32, T, W]: i·W + j
    inside: Array  # bool [T, W]: whether there is such a token

    def over_points(self, values: Array) -> Array:
        """Repeats values [T, W] along the points of a thread: [32, T, W]."""
        return jnp.broadcast_to(values[None], self.point.shape)


def tile(first_row: Array, rows: int, tokens: int, d: int) -> Tile:
    """The tile of `tokens` tokens from `first_row` on, out of `rows` rows."""
    words = d // WORD
    row = first_row + lax.broadcasted_iota(jnp.int32, (tokens, words), 0)
    column = lax.broadcasted_iota(jnp.int32, (tokens, words), 1)
    bit = lax.broadcasted_iota(jnp.int32, (WORD, tokens, words), 0)
    point = bit * words + jnp.broadcast_to(column[None], bit.shape)
    # Declared as not contiguous. Otherwise a thread would load several neighbours at once and keep
    # them in everything that follows.
    point = plgpu.max_contiguous(point, (1, 1, 1))
    return Tile(jnp.minimum(row, rows - 1), column, point, row < rows)


def load(ref: Any, at: Tile) -> Array:
    """The tile of ref [N, d], float32 [32, T, W]."""
    return ref[at.over_points(at.row), at.point].astype(jnp.float32)


def store_row(ref: Any, row: Array, mask: Array) -> Array:
    """`row` where `mask`, else a row beyond ref's last: the place of a masked store.

    Interpretation writes the old value back at masked places, so the store must not write them.
    """
    return jnp.where(mask, row, ref.shape[0])


def store(ref: Any, at: Tile, values: Array) -> None:
    """Writes values [32, T, W] to ref [N, d], in its dtype."""
    row = at.over_points(store_row(ref, at.row, at.inside))
    plgpu.store(ref.at[row, at.point], values.astype(ref.dtype), mask=at.over_points(at.inside))


def decode(at: Tile, saved_ref: Any, c_ref: Any, table_ref: Any) -> Array:
    """√d Σ_a c_a v_(f_a), float32 [32, T, W], of the saved ids [N, A] and of c [N, A]."""

    def add_atom(a: Array, sums: Array) -> Array:
        signs = sign_bits(table_ref, saved_ref[at.row, a] & ID_MASK, at.column)
        return sums + flip(at.over_points(c_ref[at.row, a]), signs)

    return lax.fori_loop(0, saved_ref.shape[1], add_atom, jnp.zeros(at.point.shape, jnp.float32))
