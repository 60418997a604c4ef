"""The backward pass as Triton kernels, without atomics: the gradients of x and of the bias.

Let g_a = ⟨v_(f_a), dx_hat⟩ where c_a > 0, else 0. Then dx = Σ_a g_a v_(f_a) / max(σ_(f_a), floor).
One kernel makes both sums and writes g. A stable sort orders g by feature, and a second kernel adds
up the values of each feature in a fixed order. So a run repeats bit for bit.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.cayley import pallas_decode
from sngpt_kernels.cayley.pallas_decode import Config, flip
from sngpt_kernels.cayley.xla import ACTIVE_BIT, ID_MASK
from sngpt_kernels.launch import launch


def _backward_kernel(*refs: Any, tokens: int) -> None:
    dx_hat_ref, saved_ref, inverse_std_ref, table_ref, dx_ref, g_ref = refs
    rows, d = dx_hat_ref.shape
    root = np.float32(d**-0.5)
    at = pallas_decode.tile(pl.program_id(0) * tokens, rows, tokens, d)
    dx_hat = pallas_decode.load(dx_hat_ref, at)
    first = at.inside & (at.column == 0)  # one column of a token writes g
    g_row = pallas_decode.store_row(g_ref, at.row, first)

    def add_atom(a: Array, sums: Array) -> Array:
        saved = saved_ref[at.row, a]
        ids = saved & ID_MASK
        signs = pallas_decode.sign_bits(table_ref, ids, at.column)
        # within a thread, then across a token's threads
        score = jnp.sum(jnp.sum(flip(dx_hat, signs), axis=0), axis=1) * root
        is_active = saved >> ACTIVE_BIT == 1
        g = jnp.where(is_active, jnp.broadcast_to(score[:, None], saved.shape), np.float32(0))
        plgpu.store(g_ref.at[g_row, a], g, mask=first)
        return sums + flip(at.over_points(g * inverse_std_ref[ids]), signs)

    sums = lax.fori_loop(0, saved_ref.shape[1], add_atom, jnp.zeros(at.point.shape, jnp.float32))
    pallas_decode.store(dx_ref, at, sums * root)


def backward(
    config: Config, interpret: bool, dx_hat: Array, saved: Array, inverse_std: Array
) -> tuple[Array, Array]:
    """dx [N, d] in dx_hat's dtype and g [N, A] float32.

    `saved` [N, A] holds ids with the active bit, `inverse_std` [F] 1 / max(σ, floor) or ones.
    """
    (rows, d), active, tokens = dx_hat.shape, saved.shape[1], config.backward_tokens
    return launch(
        "cayley_backward",
        partial(_backward_kernel, tokens=tokens),
        (pl.cdiv(rows, tokens),),
        (dx_hat, saved, inverse_std, pallas_decode.table(d, inverse_std.shape[0])),
        (ShapeDtypeStruct((rows, d), dx_hat.dtype), ShapeDtypeStruct((rows, active), jnp.float32)),
        flops=4 * rows * active * d,
        num_warps=config.backward_warps,
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
