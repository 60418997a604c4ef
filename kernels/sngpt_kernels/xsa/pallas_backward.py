"""The backward pass of `pallas_triton`, without atomics, so that it repeats bit for bit.

Let u = v̂, and out = y - s u with s = ⟨y, u⟩. From the output's cotangent c a first kernel computes
the cotangent of y, dy = c - ⟨c, u⟩ u, and δ = ⟨dy, y⟩ for the softmax's gradient. It also computes
the gradient of v through u: (1 - u uᵀ) (-⟨c, u⟩ y - s c) / |v|. Where |v| is below the floor, the
projection 1 - u uᵀ is omitted. Then one kernel passes over the queries for a tile of keys (dk, dv).
Another passes over the keys for a tile of queries (dq).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.xsa.pallas_tiles import (
    MIN_SQUARE,
    Blocks,
    Config,
    Problem,
    inverse_norm,
    is_causal,
    load,
)

# The first kernel's rows per program, without keys. 4 warps hold 3 tiles of 64 to 128 columns.
PREPARE = Blocks(queries=32, keys=0, num_warps=4, num_stages=1)


def _prepare_kernel(*refs: Any, problem: Problem, blocks: Blocks) -> None:
    cotangent_ref, out_ref, v_ref, share_ref, dy_ref, delta_ref, dv_ref = refs
    start = pl.program_id(0) * blocks.queries
    exists = problem.exists(start, blocks.queries)
    rows_exist = problem.rows_exist(start, blocks.queries)
    v = load(v_ref, exists).astype(jnp.float32)
    inverse = inverse_norm(v)
    unit = v * inverse[:, None]
    keeps_norm = jnp.sum(v * v, axis=1) > MIN_SQUARE

    def head(g: Array, dunit: Array) -> Array:
        cotangent, out = (
            load(ref.at[:, g, :], exists).astype(jnp.float32) for ref in (cotangent_ref, out_ref)
        )
        share = load(share_ref.at[g, :], rows_exist)
        y = out + share[:, None] * unit
        along = jnp.sum(cotangent * unit, axis=1)
        dy = (cotangent - along[:, None] * unit).astype(problem.dtype)
        plgpu.store(dy_ref.at[:, g, :], dy, mask=exists)
        delta = jnp.sum(dy.astype(jnp.float32) * y, axis=1)
        plgpu.store(delta_ref.at[g, :], delta, mask=rows_exist)
        return dunit - along[:, None] * y - share[:, None] * cotangent

    dunit = lax.fori_loop(0, problem.heads_per_group, head, jnp.zeros_like(v))
    along = jnp.where(keeps_norm, jnp.sum(dunit * unit, axis=1), 0.0)
    plgpu.store(dv_ref, (dunit - along[:, None] * unit) * inverse[:, None], mask=exists)


def _prepare(
    problem: Problem, cotangent: Array, out: Array, v: Array, share: Array
) -> tuple[Array, Array, Array]:
    """dy [B, T, H, h], δ [B, H, T] float32 and dv through the exclusion [B, T, K, h] float32."""
    rows, G, width = PREPARE.queries, problem.heads_per_group, problem.width
    heads = pl.BlockSpec((None, rows, G, width), lambda i, group, b: (b, i, group, 0))
    values = pl.BlockSpec((None, rows, None, width), lambda i, group, b: (b, i, group, 0))
    per_row = pl.BlockSpec((None, G, rows), lambda i, group, b: (b, group, i))
    return problem.launch(
        "xsa_prepare_backward",
        _prepare_kernel,
        PREPARE,
        (pl.cdiv(problem.length, rows), problem.groups),
        (cotangent, out, v, share),
        (
            ShapeDtypeStruct(cotangent.shape, problem.dtype),
            ShapeDtypeStruct(share.shape, jnp.float32),
            ShapeDtypeStruct(v.shape, jnp.float32),
        ),
        dots=0,
        in_specs=[heads, heads, values, per_row],
        out_specs=(heads, per_row, values),
    )


def _keys_values_kernel(*refs: Any, problem: Problem, blocks: Blocks) -> None:
    q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, *through_exclusion_ref, dk_ref, dv_ref = refs
    rows, keys = blocks.queries, blocks.keys
    start = pl.program_id(0) * keys
    exists = problem.exists(start, keys)
    k, v = load(k_ref, exists), load(v_ref, exists)

    def step(i: Array, carry: Any, g: Array, edge: bool) -> Any:
        # The scores are [keys, queries], so that no left operand needs a transpose.
        dk, dv = carry
        tile, exist = pl.ds(i * rows, rows), problem.rows_exist(i * rows, rows, ragged=edge)
        q = load(q_ref.at[tile, g, :], problem.exists(i * rows, rows, ragged=edge))
        dy = load(dy_ref.at[tile, g, :], problem.exists(i * rows, rows, ragged=edge))
        lse = load(lse_ref.at[g, tile], exist, jnp.inf)  # missing queries get the weight 0
        delta = load(delta_ref.at[g, tile], exist)
        weights = problem.weights(problem.dot(k, q, trans_b=True), lse[None, :])
        if edge:
            weights = jnp.where(is_causal(i * rows, start, (keys, rows), 0), weights, 0.0)
        dv = dv + problem.dot(weights.astype(dy.dtype), dy)
        dscores = weights * (problem.dot(v, dy, trans_b=True) - delta[None, :])
        return dk + problem.dot(dscores.astype(q.dtype), q), dv

    def head(g: Array, carry: Any) -> Any:
        first, last = lax.div(start, rows), pl.cdiv(problem.length, rows)
        # From `after` on, all queries see all of the keys.
        after = jnp.minimum(lax.div(start + keys + rows - 2, rows), last)
        # From `whole` on, the tile of queries is not full.
        whole = jnp.maximum(after, problem.length // rows)
        carry = lax.fori_loop(first, after, partial(step, g=g, edge=True), carry)
        carry = lax.fori_loop(after, whole, partial(step, g=g, edge=False), carry)
        if problem.length % rows:
            carry = lax.fori_loop(whole, last, partial(step, g=g, edge=True), carry)
        return carry

    nothing = jnp.zeros((keys, problem.width), jnp.float32)
    dv = load(through_exclusion_ref[0], exists) if problem.exclusive else nothing
    dk, dv = lax.fori_loop(0, problem.heads_per_group, head, (nothing, dv))
    plgpu.store(dk_ref, (dk * problem.scale).astype(problem.dtype), mask=exists)
    plgpu.store(dv_ref, dv.astype(problem.dtype), mask=exists)


def _keys_values(problem: Problem, blocks: Blocks, *arrays: Array) -> tuple[Array, Array]:
    """The gradients of k and v.

    `arrays` are q, k, v, dy, lse, δ and, if exclusive, dv through the exclusion.
    """
    T, G, width = problem.length, problem.heads_per_group, problem.width
    heads = pl.BlockSpec((None, T, G, width), lambda j, group, b: (b, 0, group, 0))
    values = pl.BlockSpec((None, blocks.keys, None, width), lambda j, group, b: (b, j, group, 0))
    per_row = pl.BlockSpec((None, G, T), lambda j, group, b: (b, group, 0))
    in_specs = [heads, values, values, heads, per_row, per_row]
    return problem.launch(
        "xsa_backward_keys_values",
        _keys_values_kernel,
        blocks,
        (pl.cdiv(T, blocks.keys), problem.groups),  # The first passes over the most queries.
        arrays,
        tuple(ShapeDtypeStruct(array.shape, array.dtype) for array in arrays[1:3]),
        dots=4,
        in_specs=in_specs + [values] * problem.exclusive,
        out_specs=(values, values),
    )


def _queries_kernel(*refs: Any, problem: Problem, blocks: Blocks) -> None:
    q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, dq_ref = refs
    rows, keys = blocks.queries, blocks.keys
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * rows
    exists, rows_exist = problem.exists(start, rows), problem.rows_exist(start, rows)
    q, dy = load(q_ref, exists), load(dy_ref, exists)
    lse, delta = load(lse_ref, rows_exist), load(delta_ref, rows_exist)

    def step(j: Array, dq: Array, diagonal: bool) -> Array:
        tile, exists = pl.ds(j * keys, keys), problem.exists(j * keys, keys, ragged=diagonal)
        k, v = load(k_ref.at[tile, :], exists), load(v_ref.at[tile, :], exists)
        weights = problem.weights(problem.dot(q, k, trans_b=True), lse[:, None])
        if diagonal:
            weights = jnp.where(is_causal(start, j * keys, (rows, keys), 1), weights, 0.0)
        dscores = weights * (problem.dot(dy, v, trans_b=True) - delta[:, None])
        return dq + problem.dot(dscores.astype(k.dtype), k)

    before, through = problem.key_tiles(start, blocks)
    dq = jnp.zeros((rows, problem.width), jnp.float32)
    dq = lax.fori_loop(0, before, partial(step, diagonal=False), dq)
    dq = lax.fori_loop(before, through, partial(step, diagonal=True), dq)
    plgpu.store(dq_ref, (dq * problem.scale).astype(problem.dtype), mask=exists)


def gradients(
    problem: Problem, config: Config, saved: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v, in their shapes and dtypes.

    The forward pass saved q, k, v, out, lse and, if exclusive, the share.
    """
    q, k, v, out, lse, *share = saved
    through_exclusion: list[Array] = []
    if problem.exclusive:
        dy, delta, *through_exclusion = _prepare(problem, cotangent, out, v, *share)
    else:
        delta = jnp.einsum("bthd,bthd->bht", cotangent.astype(jnp.float32), out.astype(jnp.float32))
        dy = cotangent
    arrays = [q, k, v, dy, lse, delta]
    dk, dv = _keys_values(problem, config.keys_values, *arrays, *through_exclusion)
    programs, tile, per_row, whole = problem.query_specs(config.queries)
    dq = problem.launch(
        "xsa_backward_queries",
        _queries_kernel,
        config.queries,
        (programs, problem.heads),
        arrays,
        ShapeDtypeStruct(q.shape, q.dtype),
        dots=3,
        in_specs=[tile, whole, whole, tile, per_row, per_row],
        out_specs=tile,
    )
    return dq, dk, dv
