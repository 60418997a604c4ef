"""Parts of the Triton kernels that sum signed atoms, Σ_a c_a v_(f_a): their tiles and the decoding.

A program has a tile [32, T, W] of T tokens of width d = 32·W. Element (i, t, j) belongs to point
i·W + j of token t. The default layout spreads the last axes over the lanes and keeps axis 0 inside
a thread. So a thread meets 32 points whose signs are the bits of one word (`sign_words`), and the
threads of a warp read neighbouring words. At d = 1024 with T = 4 a warp has one token. Each atom
costs a thread one word, and per point a shift, a bitwise operation and an addition.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary, sign_words

WORD = 32  # points per thread


def table(d: int, features: int) -> np.ndarray:
    """`sign_words` of the features below `features`, a power of two, at all d points: int32."""
    return sign_words.sign_words(dictionary.trace_masks(d), features.bit_length() - 1)


@dataclass(frozen=True)
class Tile:
    """The places of a program's points."""

    # int32 [T, W]: the token. Tokens beyond the last row repeat the last row.
    row: jax.Array
    column: jax.Array  # int32 [T, W]: j
    point: jax.Array  # int32 [32, T, W]: i·W + j
    inside: jax.Array  # bool [T, W]: whether there is such a token

    def over_points(self, values: jax.Array) -> jax.Array:
        """Repeats values [T, W] along the points of a thread: [32, T, W]."""
        return jnp.broadcast_to(values[None], self.point.shape)


def tile(first_row: jax.Array, rows: int, tokens: int, d: int) -> Tile:
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


def load(ref: Any, at: Tile) -> jax.Array:
    """The tile of ref [N, d], float32 [32, T, W]. Beyond the last row it repeats the last row."""
    return ref[at.over_points(at.row), at.point].astype(jnp.float32)


def store_row(ref: Any, row: jax.Array, mask: jax.Array) -> jax.Array:
    """`row` where `mask`, else a row beyond ref's last: the place of a masked store.

    Interpretation writes the old value back at masked places. So a masked place must not be one
    that the same store writes.
    """
    return jnp.where(mask, row, ref.shape[0])


def store(ref: Any, at: Tile, values: jax.Array) -> None:
    """Writes values [32, T, W] to ref [N, d], in its dtype."""
    row = at.over_points(store_row(ref, at.row, at.inside))
    plgpu.store(ref.at[row, at.point], values.astype(ref.dtype), mask=at.over_points(at.inside))


def decode(at: Tile, saved_ref: Any, c_ref: Any, table_ref: Any, id_mask: int) -> jax.Array:
    """√d Σ_a c_a v_(f_a): float32 [32, T, W].

    The refs hold c [N, A], the ids f [N, A] after `& id_mask`, and `table`.
    """

    def add_atom(a: jax.Array, sums: jax.Array) -> jax.Array:
        ids = saved_ref[at.row, a] & id_mask
        signs = sign_words.sign_bits(sign_words.words(table_ref, ids, at.column))
        return sums + sign_words.flip(at.over_points(c_ref[at.row, a]), signs)

    return lax.fori_loop(0, saved_ref.shape[1], add_atom, jnp.zeros(at.point.shape, jnp.float32))
