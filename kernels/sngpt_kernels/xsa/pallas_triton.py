"""The operation as Pallas Triton kernels for NVIDIA GPUs: flash attention.

The forward kernel keeps a tile of queries and passes over the keys up to the diagonal with an
online softmax in base 2 (FlashAttention-2, arXiv:2307.08691).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels import dispatch
from sngpt_kernels.xsa import pallas_backward
from sngpt_kernels.xsa.pallas_tiles import LOG2_E, Blocks, Config, Problem, is_causal, load


def _forward_kernel(*refs: Any, problem: Problem, blocks: Blocks) -> None:
    q_ref, k_ref, v_ref, y_ref, lse_ref = refs
    rows, keys = blocks.queries, blocks.keys
    start = (pl.num_programs(0) - 1 - pl.program_id(0)) * rows
    q = load(q_ref, problem.exists(start, rows))

    def step(j: Array, carry: Any, diagonal: bool) -> Any:
        y, maximum, total = carry
        tile = pl.ds(j * keys, keys)
        k = load(k_ref.at[tile, :], problem.exists(j * keys, keys, ragged=diagonal))
        scores = problem.dot(q, k, trans_b=True)
        if diagonal:
            scores = jnp.where(is_causal(start, j * keys, (rows, keys), 1), scores, -jnp.inf)
        larger = jnp.maximum(maximum, jnp.max(scores, axis=1) * (problem.scale * LOG2_E))
        weights = problem.weights(scores, larger[:, None])
        shrink = jnp.exp2(maximum - larger)
        v = load(v_ref.at[tile, :], problem.exists(j * keys, keys, ragged=diagonal))
        y = y * shrink[:, None] + problem.dot(weights.astype(v.dtype), v)
        return y, larger, total * shrink + jnp.sum(weights, axis=1)

    before, through = problem.key_tiles(start, blocks)
    carry = (
        jnp.zeros((rows, problem.width), jnp.float32),
        jnp.full((rows,), -jnp.inf),
        jnp.zeros((rows,), jnp.float32),
    )
    carry = lax.fori_loop(0, before, partial(step, diagonal=False), carry)
    y, maximum, total = lax.fori_loop(before, through, partial(step, diagonal=True), carry)
    y = y / total[:, None]
    plgpu.store(y_ref, y.astype(problem.dtype), mask=problem.exists(start, rows))
    plgpu.store(lse_ref, maximum + jnp.log2(total), mask=problem.rows_exist(start, rows))


def _forward(problem: Problem, blocks: Blocks, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """The output, and float32 [B, H, T], the log-sum-exp of the scores in base 2."""
    programs, tile, per_row, whole = problem.query_specs(blocks)
    row = ShapeDtypeStruct((problem.batch, problem.heads, problem.length), jnp.float32)
    return problem.launch(
        "xsa_forward",
        _forward_kernel,
        blocks,
        (programs, problem.heads),
        (q, k, v),
        (ShapeDtypeStruct(q.shape, q.dtype), row),
        dots=2,
        in_specs=[tile, whole, whole],
        out_specs=(tile, per_row),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q: Array, k: Array, v: Array, problem: Problem, config: Config) -> Array:
    return _forward(problem, config.forward, q, k, v)[0]


def _attention_forward(
    q: Array, k: Array, v: Array, problem: Problem, config: Config
) -> tuple[Array, Any]:
    forward = partial(_forward, problem, config.forward)
    y, lse = dispatch.without_derivative("attention", forward)(q, k, v)
    return y, (q, k, v, y, lse)


def _attention_backward(
    problem: Problem, config: Config, saved: Any, cotangent: Array
) -> tuple[Array, ...]:
    gradients = partial(pallas_backward.gradients, problem, config)
    return dispatch.without_derivative("attention", gradients)(saved, cotangent)


_attention.defvjp(_attention_forward, _attention_backward)


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """`api.attention` of valid arguments, before the epilogue. `interpret` serves any device."""
    B, T, H, h = q.shape
    problem = Problem(B, T, H, k.shape[2], h, scale, q.dtype, interpret)
    return _attention(q, k, v, problem, config or Config.of(q.dtype, T, h))
