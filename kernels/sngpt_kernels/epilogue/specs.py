"""Real shapes of the operation: one layer of a recipe for one GPU's microbatch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sngpt_kernels.case import Case, Cost
from sngpt_kernels.epilogue import reference
from sngpt_kernels.epilogue.api import Implementation, finish


def case(
    name: str,
    B: int,
    T: int,
    H: int,
    K: int,
    h: int,
    *,
    exclusive: bool,
    gated: bool,
    dtype: jnp.dtype,
) -> Case:
    """B sequences of T positions, H heads and K value heads of h.

    The arguments are y, then v [B, T, K, h] if exclusive, then logits [B, T, H, 1] and bias if
    gated. All arguments with rows have four axes, as a comparison cuts them.
    """

    def split(arrays: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        return (arrays[0] if exclusive else None), arrays[exclusive:]

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        shapes = [(B, T, H, h), *[(B, T, K, h)] * exclusive, *[(B, T, H, 1)] * gated]
        keys = jax.random.split(key, len(shapes) + 1)
        arrays = [jax.random.normal(*pair, dtype) for pair in zip(keys, shapes, strict=False)]
        return *arrays, *[jax.random.normal(keys[-1], (H,))] * gated

    def run(
        y: jax.Array, *arrays: jax.Array, implementation: Implementation | None = None
    ) -> jax.Array:
        v, gate = split(arrays)
        pair = (gate[0][..., 0], gate[1]) if gated else None
        return finish(y, v, pair, implementation=implementation)

    def in_float64(y: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
        v, gate = split(arrays)
        return reference.finish(y, v, (gate[0][..., 0], gate[1]) if gated else None)

    heads = B * T * H * h * dtype.itemsize
    values = B * T * K * h * dtype.itemsize * exclusive
    logits = B * T * H * dtype.itemsize * gated
    return Case(
        name=name,
        make=make,
        run=run,
        differentiated=tuple(range(1 + exclusive + 2 * gated)),
        reference=in_float64,
        implementations=("xla", "pallas_triton"),
        forward=Cost(0, 2 * heads + values + logits),
        backward=Cost(0, 3 * heads + 2 * values + 2 * logits),
    )


BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
SHAPE = (48, 2048, 8, 4, 64)

CASES: tuple[Case, ...] = (
    case("golf_9l_xsa_ngram", *SHAPE, exclusive=True, gated=False, dtype=BFLOAT16),
    case("golf_11l_xsa4", 32, *SHAPE[1:], exclusive=True, gated=False, dtype=BFLOAT16),
    case("golf_12l_recycled", *SHAPE, exclusive=True, gated=True, dtype=BFLOAT16),
    case("golf_12l_recycled_gate", *SHAPE, exclusive=False, gated=True, dtype=BFLOAT16),
    case("quickstart", 4, 256, 2, 1, 64, exclusive=True, gated=True, dtype=FLOAT32),
)
