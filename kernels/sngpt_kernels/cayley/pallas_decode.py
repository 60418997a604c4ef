"""Parts of the Triton kernels that sum signed atoms, Σ_a c_a v_(f_a): the tiles that they work on,
and the decoding.

A program has a tile [32, T, W] of T tokens of width d = 32·W: element (i, t, j) belongs to point
i·W + j of token t. The default layout spreads the last axes over the lanes and keeps axis 0 inside
of a thread. So a thread meets 32 points whose signs are the bits of one word (`sign_words`), what
the threads of a warp read lies side by side, and at d = 1024 with T = 4 a warp has one token. Each
atom is one word a thread and then a shift, a bitwise operation and an addition a point.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary, sign_words

WORD = 32  # points a thread


def table(d: int, features: int) -> np.ndarray:
    """The words of the signs of the features below `features`, a power of two, at all d points,
    int32: see `sign_words`.
    """
    return sign_words.sign_words(dictionary.trace_masks(d), features.bit_length() - 1)


@dataclass(frozen=True)
class Tile:
    """Where the points of a program's tokens lie."""

    row: jax.Array  # int32 [T, W], of the token: the last of all for the program's tokens beyond it
    column: jax.Array  # int32 [T, W]: j
    point: jax.Array  # int32 [32, T, W]: i·W + j
    inside: jax.Array  # bool [T, W]: there is such a token

    def over_points(self, values: jax.Array) -> jax.Array:
        """values [T, W], repeated along the points of a thread: [32, T, W]."""
        return jnp.broadcast_to(values[None], self.point.shape)


def tile(first_row: jax.Array, rows: int, tokens: int, d: int) -> Tile:
    """The tile of the `tokens` tokens from `first_row` on, of `rows` in all."""
    words = d // WORD
    row = first_row + lax.broadcasted_iota(jnp.int32, (tokens, words), 0)
    column = lax.broadcasted_iota(jnp.int32, (tokens, words), 1)
    bit = lax.broadcasted_iota(jnp.int32, (WORD, tokens, words), 0)
    point = bit * words + jnp.broadcast_to(column[None], bit.shape)
    # said not to be contiguous: a thread that loads several neighbours at once would have them in
    # all that follows
    point = plgpu.max_contiguous(point, (1, 1, 1))
    return Tile(jnp.minimum(row, rows - 1), column, point, row < rows)


def load(ref: Any, at: Tile) -> jax.Array:
    """The tile of ref [N, d], float32 [32, T, W]; beyond the last row it repeats that."""
    return ref[at.over_points(at.row), at.point].astype(jnp.float32)


def store_row(ref: Any, row: jax.Array, mask: jax.Array) -> jax.Array:
    """`row` where `mask`, else one beyond ref's last: the place of a masked store.

    Interpretation writes back what was at the masked places: they must not be such that the same
    store writes.
    """
    return jnp.where(mask, row, ref.shape[0])


def store(ref: Any, at: Tile, values: jax.Array) -> None:
    """Writes values [32, T, W] to ref [N, d], in its dtype."""
    row = at.over_points(store_row(ref, at.row, at.inside))
    plgpu.store(ref.at[row, at.point], values.astype(ref.dtype), mask=at.over_points(at.inside))


def decode(at: Tile, saved_ref: Any, c_ref: Any, table_ref: Any, id_mask: int) -> jax.Array:
    """√d Σ_a c_a v_(f_a) for c and (after `& id_mask`) ids f in refs [N, A], and a ref to
    `sign_words`: float32 [32, T, W].
    """

    def add_atom(a: jax.Array, sums: jax.Array) -> jax.Array:
        ids = saved_ref[at.row, a] & id_mask
        signs = sign_words.sign_bits(sign_words.words(table_ref, ids, at.column))
        return sums + sign_words.flip(at.over_points(c_ref[at.row, a]), signs)

    return lax.fori_loop(0, saved_ref.shape[1], add_atom, jnp.zeros(at.point.shape, jnp.float32))
