"""The backward pass as Triton kernels, without atomics: the gradients of x and of the bias.

Let g_a = ⟨v_(f_a), dx_hat⟩ where c_a > 0, else 0. Then dx = Σ_a g_a v_(f_a) / max(σ_(f_a), floor).
One kernel of one warp per token makes both sums and writes g. A stable sort orders g by feature,
and a second kernel adds up the values of each feature in a fixed order. So a run repeats bit for
bit.

The atoms are signs, and both sums take their signs by four. For g, a lane has a feature, and four
points of dx_hat have 16 signed sums, one per pattern of four signs. For dx, a lane has a column of
32 points, and four features have 16 signed sums. The lanes hold these sums, and a shuffle looks
one up. So a sign costs three quarters of an instruction, where a flip and an addition cost three.
"""

import functools
import operator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary, pallas_decode
from sngpt_kernels.cayley.folding import DIGIT_BITS, sign_words
from sngpt_kernels.cayley.pallas_decode import WORD, Config, flip
from sngpt_kernels.cayley.pallas_encode import barrier
from sngpt_kernels.cayley.xla import ACTIVE_BIT, ID_MASK
from sngpt_kernels.launch import launch

NIBBLE = 4  # signs per look-up
LANES = 32  # threads of the backward kernel's warp


def lookup_asm(pack: int) -> str:
    """PTX that looks `pack` signed sums up: results, 4 · pack values and pack indices.

    A value's `pack` copies are equal. Every lane makes the sum of the bits of its own number.
    """
    lines = [".reg .b32 lane, s; .reg .f32 t; mov.u32 lane, %laneid;"]
    for bit in range(NIBBLE):
        # the lane's sign of this value as ±1
        lines.append(f"shl.b32 s, lane, {31 - bit}; and.b32 s, s, 0x80000000;")
        lines.append("or.b32 s, s, 0x3f800000;")
        value = f"${pack * (1 + bit)}"
        lines.append(f"fma.rn.f32 t, s, {value}, t;" if bit else f"mul.f32 t, s, {value};")
    for i in range(pack):  # a shuffle reads the lowest five bits of an index
        lines.append(f"shfl.sync.idx.b32 ${i}, t, ${pack * (1 + NIBBLE) + i}, 31, 0xffffffff;")
    return "{ " + " ".join(lines) + " }"


def signed_sums(values: list[Array], index: Array, interpret: bool) -> Array:
    """The sum of four scalars, each minus where its bit of `index` is set: float32 like `index`.

    All threads of the program's only warp must have the same values.
    """
    wide = [jnp.full(index.shape, value) for value in values]
    if interpret:
        bits = enumerate(wide)
        return functools.reduce(
            operator.add,
            (flip(value, index << 31 - bit & jnp.int32(-(2**31))) for bit, value in bits),
        )
    pack = max(1, min(8, index.size // LANES))
    (sums,) = plgpu.elementwise_inline_asm(
        lookup_asm(pack),
        args=[*wide, index],
        constraints=",".join(["=&f"] * pack + ["f"] * (pack * NIBBLE) + ["r"] * pack),
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


def _backward_kernel(*refs: Any, interpret: bool) -> None:
    dx_hat_ref, saved_ref, inverse_std_ref, by_point_ref, by_lane_ref, dx_ref, g_ref = refs
    (_, d), active = dx_hat_ref.shape, saved_ref.shape[1]
    row, root, columns = pl.program_id(0), np.float32(d**-0.5), d // WORD
    lanes = LANES * pl.next_power_of_2(pl.cdiv(active, LANES))
    a = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
    exists = a < active
    saved = saved_ref[row, jnp.minimum(a, active - 1)]
    ids = saved & ID_MASK
    digits = [(ids >> DIGIT_BITS * c) & (2**DIGIT_BITS - 1) for c in range(by_lane_ref.shape[1])]

    def add_column(j: Array, scores: Array) -> Array:
        words = functools.reduce(
            operator.xor, [by_lane_ref[j, c, digit] for c, digit in enumerate(digits)]
        )
        for first in range(0, WORD, NIBBLE):
            points = j * WORD + first
            values = [dx_hat_ref[row, points + k].astype(jnp.float32) for k in range(NIBBLE)]
            scores += signed_sums(values, words >> first, interpret)
        return scores

    scores = lax.fori_loop(0, columns, add_column, jnp.zeros((lanes,), jnp.float32))
    g = jnp.where(saved >> ACTIVE_BIT == 1, scores * root, np.float32(0))
    # All lanes need every number. They pass through memory.
    row_of_a = pallas_decode.store_row(g_ref, jnp.broadcast_to(row, a.shape), exists)
    plgpu.store(g_ref.at[row_of_a, a], g * inverse_std_ref[ids] * root, mask=exists)
    barrier(interpret)

    bit = lax.broadcasted_iota(jnp.int32, (WORD // NIBBLE, columns), 0) * NIBBLE
    column = lax.broadcasted_iota(jnp.int32, (columns,), 0)

    def add_features(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        first = i * NIBBLE
        words, values = [], []
        for k in range(NIBBLE):
            at = jnp.minimum(first + k, active - 1)
            value = g_ref[row, at]
            if active % NIBBLE:
                value = jnp.where(first + k < active, value, np.float32(0))
            values.append(value)
            of_id = jnp.broadcast_to(saved_ref[row, at] & ID_MASK, column.shape)
            words.append(pallas_decode.words(by_point_ref, of_id, column))
        return tuple(
            sums[p] + signed_sums(values, jnp.broadcast_to(word[None], bit.shape) >> bit, interpret)
            for p, word in enumerate(transposed(words))
        )

    zeros = (jnp.zeros(bit.shape, jnp.float32),) * NIBBLE
    sums = lax.fori_loop(0, pl.cdiv(active, NIBBLE), add_features, zeros)
    barrier(interpret)
    plgpu.store(g_ref.at[row_of_a, a], g, mask=exists)
    for p in range(NIBBLE):
        point = (bit + p) * columns + jnp.broadcast_to(column[None], bit.shape)
        point = plgpu.max_contiguous(point, (1, 1))
        dx_ref[row, point] = sums[p].astype(dx_ref.dtype)


def backward(
    interpret: bool, dx_hat: Array, saved: Array, inverse_std: Array
) -> tuple[Array, Array]:
    """dx [N, d] in dx_hat's dtype and g [N, A] float32.

    `saved` [N, A] holds ids with the active bit, `inverse_std` [F] 1 / max(σ, floor) or ones.
    """
    (rows, d), active = dx_hat.shape, saved.shape[1]
    masks, n = dictionary.trace_masks(d), inverse_std.shape[0].bit_length() - 1
    by_point = sign_words(masks.reshape(-1, WORD).T.reshape(-1), n)
    return launch(
        "cayley_backward",
        partial(_backward_kernel, interpret=interpret),
        (rows,),
        (dx_hat, saved, inverse_std, sign_words(masks, n), by_point.transpose(2, 0, 1)),
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
