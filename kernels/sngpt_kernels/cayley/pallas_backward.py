"""The backward pass as Triton kernels, without atomics: the gradients of x and of the bias.

Let g_a = ⟨v_(f_a), dx_hat⟩ where c_a > 0, else 0. Then dx = Σ_a g_a v_(f_a) / max(σ_(f_a), floor).
One kernel makes both sums and writes g, with one warp per token. A stable sort orders g by feature,
and a second kernel adds up the values of each feature in a fixed order. So a run repeats bit for
bit.

Both sums look several signs up at once (`pallas_lookup`): for g those of five points, where a lane
has a feature, and for dx those of four features, where a lane has a column of 32 points.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import dictionary, pallas_decode, pallas_lookup
from sngpt_kernels.cayley.folding import sign_words
from sngpt_kernels.cayley.pallas_decode import WORD, Config
from sngpt_kernels.cayley.pallas_encode import barrier
from sngpt_kernels.cayley.pallas_lookup import DIGIT_BITS, LANES, POINTS, parts, signed_sums
from sngpt_kernels.cayley.xla import ACTIVE_BIT, ID_MASK
from sngpt_kernels.launch import launch

TRIP = 8  # see `pallas_lookup.combine`; 16 would take 118 instead of 80 registers


def _float32(x: Array) -> Array:
    """x in float32. Triton's conversion of a bfloat16 takes two instructions for every other."""
    if x.dtype == jnp.float32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.int16).astype(jnp.int32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


def _backward_kernel(*refs: Any, interpret: bool) -> None:
    dx_hat_ref, saved_ref, inverse_std_ref, by_lane_ref, by_point_ref, dx_ref, g_ref = refs
    (_, d), active = dx_hat_ref.shape, saved_ref.shape[1]
    row, root = pl.program_id(0), np.float32(d**-0.5)
    blocks, digits, _, block = by_point_ref.shape

    # g: the lanes have the features
    shape = pl.next_power_of_2(pl.cdiv(active, LANES)), LANES
    group, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2))
    a = plgpu.max_contiguous(group * LANES + lane, (1, 1))  # else a lane would have neighbours
    exists = a < active
    saved = saved_ref[row, jnp.minimum(a, active - 1)]
    ids = saved & ID_MASK
    of_block = lax.broadcasted_iota(jnp.int32, (*shape, block), 2)
    entries = [
        jnp.broadcast_to(e[..., None], of_block.shape) for e in pallas_lookup.digits(ids, digits)
    ]
    eight = lax.broadcasted_iota(jnp.int32, (LANES, 8), 1)  # 16 bytes, the same for all lanes

    def add_columns(i: Array | int, scores: Array) -> Array:
        words = pallas_lookup.xor(
            by_point_ref[i, c, entry, of_block] for c, entry in enumerate(entries)
        )
        for j, word in enumerate(parts(words)):
            points: list[Array] = []
            for first in range(0, WORD, 8):
                at = (i * block + j) * WORD + first + eight
                points += parts(_float32(dx_hat_ref[row, at]))
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
    sums = pallas_lookup.combine(row, g_ref, saved_ref, by_lane_ref, TRIP, interpret)
    barrier(interpret)
    plgpu.store(g_ref.at[row_of_a, a], g, mask=exists)
    pallas_lookup.store(dx_ref, row, sums)


def _by_point(d: int, features: int) -> np.ndarray:
    """The signs of the features as bits, for lanes that have features.

    Bit i of word j belongs to point 32 j + i: int32 [blocks, digits, entries, words per block].
    """
    masks = dictionary.trace_masks(d).reshape(-1, WORD).T
    table = sign_words(masks.reshape(-1), features.bit_length() - 1, DIGIT_BITS)
    digits, entries, columns = table.shape
    # At width 2048, where a lane has two columns, more words would take more than 128 registers.
    block = min(4, columns) if columns <= LANES else 2
    return table.reshape(digits, entries, -1, block).transpose(2, 0, 1, 3)


def backward(
    interpret: bool, dx_hat: Array, saved: Array, inverse_std: Array
) -> tuple[Array, Array]:
    """dx [N, d] in dx_hat's dtype and g [N, A] float32.

    `saved` [N, A] holds ids with the active bit, `inverse_std` [F] 1 / max(σ, floor) or ones.
    """
    (rows, d), active, features = dx_hat.shape, saved.shape[1], inverse_std.shape[0]
    return launch(
        "cayley_backward",
        partial(_backward_kernel, interpret=interpret),
        (rows,),
        (dx_hat, saved, inverse_std, pallas_lookup.table(d, features), _by_point(d, features)),
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
