"""The backward pass of `pallas_triton`, without atomics, so that it repeats bit for bit.

One kernel passes over the queries for a tile of keys (dk, dv). Another passes over the keys for a
tile of queries (dq). δ = ⟨dy, y⟩ of each row is the softmax's part of the gradient, with the
output's cotangent dy.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels.xsa.pallas_tiles import Blocks, Config, Problem, is_causal, load


def _keys_values_kernel(*refs: Any, problem: Problem, blocks: Blocks) -> None:
    q_ref, k_ref, v_ref, dy_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs
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
    dk, dv = lax.fori_loop(0, problem.heads_per_group, head, (nothing, nothing))
    plgpu.store(dk_ref, (dk * problem.scale).astype(problem.dtype), mask=exists)
    plgpu.store(dv_ref, dv.astype(problem.dtype), mask=exists)


def _keys_values(problem: Problem, blocks: Blocks, *arrays: Array) -> tuple[Array, Array]:
    """The gradients of k and v. `arrays` are q, k, v, dy, lse and δ."""
    T, G, width = problem.length, problem.heads_per_group, problem.width
    heads = pl.BlockSpec((None, T, G, width), lambda j, group, b: (b, 0, group, 0))
    values = pl.BlockSpec((None, blocks.keys, None, width), lambda j, group, b: (b, j, group, 0))
    per_row = pl.BlockSpec((None, G, T), lambda j, group, b: (b, group, 0))
    return problem.launch(
        "xsa_backward_keys_values",
        _keys_values_kernel,
        blocks,
        (pl.cdiv(T, blocks.keys), problem.groups),  # The first passes over the most queries.
        arrays,
        tuple(ShapeDtypeStruct(array.shape, array.dtype) for array in arrays[1:3]),
        dots=4,
        in_specs=[heads, values, values, heads, per_row, per_row],
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
    problem: Problem, config: Config, saved: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v, in their shapes and dtypes.

    The forward pass saved q, k, v, y and lse.
    """
    q, k, v, y, lse = saved
    delta = jnp.einsum("bthd,bthd->bht", dy.astype(jnp.float32), y.astype(jnp.float32))
    arrays = [q, k, v, dy, lse, delta]
    dk, dv = _keys_values(problem, config.keys_values, *arrays)
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
