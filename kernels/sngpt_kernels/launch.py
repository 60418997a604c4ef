"""The launch of a Pallas Triton kernel, with its cost for XLA's scheduler."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def launch(
    name: str,
    kernel: Any,
    grid: tuple[int, ...],
    inputs: Sequence[Any],
    results: Any,
    *,
    flops: int,
    num_warps: int,
    num_stages: int = 1,
    transcendentals: int = 0,
    **options: Any,
) -> Any:
    """`pl.pallas_call` of `inputs`, which reads them and writes `results` once.

    `results` are the shapes and dtypes, `options` other arguments of `pl.pallas_call`.
    """
    arrays = jax.tree.leaves((tuple(inputs), results))
    size = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=transcendentals, bytes_accessed=size
        ),
        name=name,
        **options,
    )(*inputs)
