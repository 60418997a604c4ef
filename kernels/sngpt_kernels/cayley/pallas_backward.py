"""The backward pass as Triton kernels, without atomics: the gradients of x and of the bias.

Let g_a = ⟨v_(f_a), dx_hat⟩ where c_a > 0, else 0. Then dx = Σ_a g_a v_(f_a) / max(σ_(f_a), floor).
One kernel makes both sums and writes g, with one warp per token. A stable sort orders g by feature,
and a second kernel adds up the values of each feature in a fixed order. So a run repeats bit for
bit.

The atoms are signs, and both sums take several signs at once. For g, a lane has a feature. The sum
of five points of dx_hat has 32 patterns of signs, each lane makes one, and a shuffle looks up the
pattern of the lane's feature. For dx, a lane has a column of 32 points, and the shuffle looks up a
sum over four features. So four or five signs cost a shift, a shuffle and an addition.
"""

import functools
import operator
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary, pallas_decode
from sngpt_kernels.cayley.folding import sign_words
from sngpt_kernels.cayley.pallas_decode import WORD, Config, flip
from sngpt_kernels.cayley.pallas_encode import barrier
from sngpt_kernels.cayley.xla import ACTIVE_BIT, ID_MASK
from sngpt_kernels.launch import launch

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


def _digits(ids: Array, count: int) -> list[Array]:
    return [(ids >> DIGIT_BITS * c) & (2**DIGIT_BITS - 1) for c in range(count)]


def _xor(words: Iterable[Array]) -> Array:
    return functools.reduce(operator.xor, words)


def _parts(array: Array) -> list[Array]:
    """The n slices [...] of array [..., n]."""
    parts = lax.split(array, [1] * array.shape[-1], axis=array.ndim - 1)
    return [part.reshape(array.shape[:-1]) for part in parts]


def _float32(x: Array) -> Array:
    """x in float32. Triton's conversion of a bfloat16 takes two instructions for every other."""
    if x.dtype == jnp.float32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def _backward_kernel(*refs: Any, interpret: bool) -> None:
    dx_hat_ref, saved_ref, inverse_std_ref, by_lane_ref, by_point_ref, dx_ref, g_ref = refs
    (_, d), active = dx_hat_ref.shape, saved_ref.shape[1]
    row, root, columns = pl.program_id(0), np.float32(d**-0.5), d // WORD
    blocks, digits, _, block = by_point_ref.shape

    # g: the lanes have the features
    shape = pl.next_power_of_2(pl.cdiv(active, LANES)), LANES
    group, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    a = plgpu.max_contiguous(group * LANES + lane, (1, 1))  # else a lane would have neighbours
    exists = a < active
    saved = saved_ref[row, jnp.minimum(a, active - 1)]
    ids = saved & ID_MASK
    of_block = lax.broadcasted_iota(jnp.int32, (*shape, block), 2)
    entries = [jnp.broadcast_to(e[..., None], of_block.shape) for e in _digits(ids, digits)]
    eight = lax.broadcasted_iota(jnp.int32, (LANES, 8), 1)  # 16 bytes, the same for all lanes

    def add_columns(i: Array | int, scores: Array) -> Array:
        words = _xor(by_point_ref[i, c, entry, of_block] for c, entry in enumerate(entries))
        for j, word in enumerate(_parts(words)):
            points: list[Array] = []
            for first in range(0, WORD, 8):
                at = (i * block + j) * WORD + first + eight
                points += _parts(_float32(dx_hat_ref[row, at]))
            for first in range(0, WORD, POINTS):
                few = [point[None] for point in points[first : first + POINTS]]
                scores += signed_sums(few, word >> first, interpret)
        return scores

    scores = jnp.zeros(shape, jnp.float32)
    if blocks == 1:
        scores = add_columns(0, scores)
    else:
        scores = lax.fori_loop(0, blocks, add_columns, scores)
    g = jnp.where(saved >> ACTIVE_BIT == 1, scores * root, np.float32(0))
    # Every lane needs the coefficients of all atoms. They pass through memory, in the place of g.
    row_of_a = pallas_decode.store_row(g_ref, jnp.broadcast_to(row, shape), exists)
    plgpu.store(g_ref.at[row_of_a, a], g * inverse_std_ref[ids] * root, mask=exists)
    barrier(interpret)

    # dx: the lanes have the columns
    column = lax.broadcasted_iota(jnp.int32, (columns,), 0)
    nibble, of_nibble = (
        lax.broadcasted_iota(jnp.int32, (WORD // FEATURES, columns), axis) for axis in range(2)
    )
    four = lax.broadcasted_iota(jnp.int32, (columns, FEATURES), 1)

    def add_features(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        at = i * FEATURES + four
        if active % FEATURES:
            missing, at = at >= active, jnp.minimum(at, active - 1)
            coefficients = jnp.where(missing, np.float32(0), g_ref[row, at])
        else:
            coefficients = g_ref[row, at]
        values = [value[None] for value in _parts(coefficients)]
        words = [
            _xor(by_lane_ref[c, entry, column] for c, entry in enumerate(_digits(ids, digits)))
            for ids in _parts(saved_ref[row, at] & ID_MASK)
        ]
        return tuple(
            p_sums + signed_sums(values, jnp.broadcast_to(word, nibble.shape) >> shift, interpret)
            for p_sums, word in zip(sums, transposed(words), strict=True)
        )

    shift = FEATURES * nibble
    zeros = (jnp.zeros(nibble.shape, jnp.float32),) * FEATURES
    sums = lax.fori_loop(0, pl.cdiv(active, FEATURES), add_features, zeros)
    barrier(interpret)
    plgpu.store(g_ref.at[row_of_a, a], g, mask=exists)
    for p, p_sums in enumerate(sums):
        point = plgpu.max_contiguous((shift + p) * columns + of_nibble, (1, 1))
        dx_ref[row, point] = p_sums.astype(dx_ref.dtype)


def _tables(d: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The signs of the features as bits: for lanes with columns, and for lanes with features.

    Bit i of word j belongs to point i · d/32 + j in the first table, int32 [digits, entries, d/32],
    and to point 32 j + i in the second, [blocks, digits, entries, words per block].
    """
    masks, n = dictionary.trace_masks(d), features.bit_length() - 1
    by_point = sign_words(masks.reshape(-1, WORD).T.reshape(-1), n, DIGIT_BITS)
    digits, entries, columns = by_point.shape
    # At width 2048, where a lane has two columns, more words would take more than 128 registers.
    block = min(4, columns) if columns <= LANES else 2
    by_point = by_point.reshape(digits, entries, -1, block).transpose(2, 0, 1, 3)
    return sign_words(masks, n, DIGIT_BITS), by_point


def backward(
    interpret: bool, dx_hat: Array, saved: Array, inverse_std: Array
) -> tuple[Array, Array]:
    """dx [N, d] in dx_hat's dtype and g [N, A] float32.

    `saved` [N, A] holds ids with the active bit, `inverse_std` [F] 1 / max(σ, floor) or ones.
    """
    (rows, d), active = dx_hat.shape, saved.shape[1]
    return launch(
        "cayley_backward",
        partial(_backward_kernel, interpret=interpret),
        (rows,),
        (dx_hat, saved, inverse_std, *_tables(d, inverse_std.shape[0])),
        (ShapeDtypeStruct((rows, d), dx_hat.dtype), ShapeDtypeStruct((rows, active), jnp.float32)),
        flops=4 * rows * active * d,
        num_warps=1,
        interpret=interpret,
    )


def _sum_kernel(
    starts_ref: Any, values_ref: Any, sums_ref: Any, *, features: int, lanes: int
) -> None:
    """Adds up the values from starts[f] to starts[f + 1] of some f: every lane, then the lanes."""
    feature = pl.program_id(0) * features + lax.broadcasted_iota(jnp.int32, (features,), 0)
    last = sums_ref.shape[0] - 1
    start, stop = starts_ref[jnp.minimum(feature, last)], starts_ref[jnp.minimum(feature, last) + 1]
    lane = lax.broadcasted_iota(jnp.int32, (features, lanes), 1)

    def add_tile(i: Array, sums: Array) -> Array:
        index = start[:, None] + (i * lanes + lane)
        return sums + plgpu.load(values_ref.at[index], mask=index < stop[:, None], other=0.0)

    tiles = (jnp.max(stop - start) + (lanes - 1)) // lanes
    sums = lax.fori_loop(0, tiles, add_tile, jnp.zeros((features, lanes), jnp.float32))
    plgpu.store(sums_ref.at[feature], jnp.sum(sums, axis=1), mask=feature <= last)


def bias_gradient(config: Config, interpret: bool, saved: Array, g: Array, features: int) -> Array:
    """Σ of g [N, A] by the feature in saved [N, A]: float32 [features]."""
    pairs = (saved & ID_MASK).reshape(-1), g.reshape(-1)
    ids, values = lax.sort(pairs, is_stable=True, num_keys=1)
    bounds = jnp.arange(features + 1, dtype=jnp.int32)
    starts = jnp.searchsorted(ids, bounds, method="scan_unrolled").astype(jnp.int32)
    return launch(
        "cayley_bias_gradient",
        partial(_sum_kernel, features=config.bias_features, lanes=config.bias_lanes),
        (pl.cdiv(features, config.bias_features),),
        (starts, values),
        ShapeDtypeStruct((features,), jnp.float32),
        flops=values.size,
        num_warps=config.bias_warps,
        interpret=interpret,
    )
