"""Sums with signs by look-ups, in a Triton kernel of one warp: four or five signs at once.

The sum of five numbers has 32 patterns of signs. Every lane makes the sum of one pattern, and a
shuffle looks up a pattern. So five signs cost a shift, a shuffle and an addition, where one sign
costs as much by a flip and an addition.
"""

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.folding import sign_words
from sngpt_kernels.cayley.pallas_decode import WORD, flip
from sngpt_kernels.cayley.xla import ID_MASK

LANES = 32  # threads of the warp of a token
POINTS = 5  # per look-up, at most: a pattern per lane
FEATURES = 4  # per look-up; five would need more instructions to collect their signs
DIGIT_BITS = 6  # The two tables of signs take 8 to 96 kB together and stay in a GPU's L1 cache.


def lookup_asm(values: int, pack: int) -> str:
    """PTX that looks `pack` signed sums up: results, `pack` copies of each value, `pack` indices.

    Every lane makes the sum whose index is its own number.
    """
    lines = [".reg .b32 lane, s; .reg .f32 t; mov.u32 lane, %tid.x;"]
    for bit in range(values):
        # the lane's sign of this value as ±1
        lines.append(f"shl.b32 s, lane, {31 - bit}; and.b32 s, s, 0x80000000;")
        lines.append("or.b32 s, s, 0x3f800000;")
        value = f"${pack * (1 + bit)}"
        lines.append(f"fma.rn.f32 t, s, {value}, t;" if bit else f"mul.f32 t, s, {value};")
    for i in range(pack):  # a shuffle reads the lowest five bits of an index
        lines.append(f"shfl.sync.idx.b32 ${i}, t, ${pack * (1 + values) + i}, 31, 0xffffffff;")
    return "{ " + " ".join(lines) + " }"


def signed_sums(values: list[Array], index: Array, interpret: bool) -> Array:
    """The sum of up to five values, each minus where its bit of `index` is set: float32.

    The values broadcast to `index`. All threads of the program's only warp must have the same
    values. Higher bits of `index` have no effect.
    """
    values = [jnp.broadcast_to(value, index.shape) for value in values]
    if interpret:
        signs = [index << 31 - bit & jnp.int32(-(2**31)) for bit in range(len(values))]
        return functools.reduce(operator.add, map(flip, values, signs))
    pack = max(1, min(8, index.size // LANES))
    (sums,) = plgpu.elementwise_inline_asm(
        lookup_asm(len(values), pack),
        args=[*values, index],
        constraints=",".join(["=&f"] * pack + ["f"] * (pack * len(values)) + ["r"] * pack),
        pack=pack,
        result_shape_dtypes=[ShapeDtypeStruct(index.shape, jnp.float32)],
    )
    return sums


def transposed(words: list[Array]) -> list[Array]:
    """Nibble q of result p has bit 4q + p of every one of the four words."""
    a, b, c, d = words

    def swapped(x: Array, y: Array, by: int, mask: int) -> tuple[Array, Array]:
        moved = ((x >> by) ^ y) & jnp.int32(mask)
        return x ^ (moved << by), y ^ moved

    a, b = swapped(a, b, 1, 0x55555555)
    c, d = swapped(c, d, 1, 0x55555555)
    a, c = swapped(a, c, 2, 0x33333333)
    b, d = swapped(b, d, 2, 0x33333333)
    return [a, b, c, d]


def digits(ids: Array, count: int) -> list[Array]:
    """The first `count` digits of ids: the rows of the tables of signs."""
    return [(ids >> DIGIT_BITS * c) & (2**DIGIT_BITS - 1) for c in range(count)]


def xor(words: Iterable[Array]) -> Array:
    """The exclusive or of the words of an id's digits: the word of the id."""
    return functools.reduce(operator.xor, words)


def parts(array: Array) -> list[Array]:
    """The n slices [...] of array [..., n]."""
    parts = lax.split(array, [1] * array.shape[-1], axis=array.ndim - 1)
    return [part.reshape(array.shape[:-1]) for part in parts]


def table(d: int, features: int) -> np.ndarray:
    """The signs of the features as bits, for `combine`: int32 [digits, entries, d/32].

    Bit i of word j belongs to point i · d/32 + j.
    """
    return sign_words(dictionary.trace_masks(d), features.bit_length() - 1, DIGIT_BITS)


def _places(columns: int) -> tuple[Array, Array]:
    """4q and j as int32 [8, d/32]: sums p of `combine` hold points (4q + p) · d/32 + j."""
    shape = WORD // FEATURES, columns
    q, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    return FEATURES * q, column


def combine(
    row: Array, c_ref: Any, saved_ref: Any, table_ref: Any, trip: int, interpret: bool
) -> tuple[Array, ...]:
    """√d Σ_a c_a v_(f_a) of a row of c [N, A] and of saved ids [N, A], for `store`.

    The program has one warp, whose lanes have the columns of 32 points. A trip of the loop takes
    `trip` features, a multiple of 4, and has one barrier.
    """
    active, (count, _, columns) = saved_ref.shape[1], table_ref.shape
    block = min(4, columns)
    shape = columns // block, trip, block
    first, feature, second = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    column = first * block + second
    four = lax.broadcasted_iota(jnp.int32, (columns, FEATURES), 1)
    shift, _ = _places(columns)

    def add_features(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        mine = i * trip + feature
        if active % trip:
            mine = jnp.minimum(mine, active - 1)
        # A lane loads four words of one feature. Then the words move to the lanes of their columns.
        ids = saved_ref[row, plgpu.max_contiguous(mine, (1, 1, 1))] & ID_MASK
        loaded = xor(table_ref[c, entry, column] for c, entry in enumerate(digits(ids, count)))
        words = parts(loaded.transpose(0, 2, 1).reshape(columns, trip))
        for start in range(0, trip, FEATURES):
            at = i * trip + start + four  # all lanes load the same coefficients
            if active % trip:
                coefficients = c_ref[row, jnp.minimum(at, active - 1)]
                coefficients = jnp.where(at < active, coefficients, np.float32(0))
            else:
                coefficients = c_ref[row, at]
            values = [value[None] for value in parts(coefficients)]
            sums = tuple(
                p_sums
                + signed_sums(values, jnp.broadcast_to(word, shift.shape) >> shift, interpret)
                for p_sums, word in zip(
                    sums, transposed(words[start : start + FEATURES]), strict=True
                )
            )
        return sums

    zeros = (jnp.zeros(shift.shape, jnp.float32),) * FEATURES
    return lax.fori_loop(0, pl.cdiv(active, trip), add_features, zeros)


def store(ref: Any, row: Array, sums: tuple[Array, ...]) -> None:
    """Writes the sums of `combine` to a row of ref [N, d], in its dtype."""
    columns = ref.shape[1] // WORD
    shift, column = _places(columns)
    for p, p_sums in enumerate(sums):
        # as not contiguous, so that a lane stores what it has
        point = plgpu.max_contiguous((shift + p) * columns + column, (1, 1))
        ref[row, point] = p_sums.astype(ref.dtype)
