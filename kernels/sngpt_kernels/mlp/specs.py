"""Real shapes of the operation: a block of a golf recipe for one GPU's microbatch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sngpt_kernels.case import Case, Cost
from sngpt_kernels.mlp import reference
from sngpt_kernels.mlp.api import Activation, residual_mlp

EPS, SCALE = 1.1920929e-7, 0.5


def case(
    name: str, tokens: int, D: int, F: int, *, activation: Activation, dtype: jnp.dtype
) -> Case:
    """The heads are as wide as the stream, D."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        of_rows, of_out, of_up, of_down = jax.random.split(key, 4)
        x, y = jax.random.normal(of_rows, (2, tokens, D), dtype)
        drawn = ((of_out, D, D), (of_up, D, F), (of_down, F, D))
        return x, y, *(jax.random.normal(k, (n, m), dtype) * n**-0.5 for k, n, m in drawn)

    options: dict[str, Any] = {"activation": activation, "eps": EPS, "scale": SCALE}
    products = 2 * tokens * (D * D + 2 * D * F)
    row, matrices = tokens * D * dtype.itemsize, (D * D + 2 * D * F) * dtype.itemsize
    return Case(
        name=name,
        make=make,
        run=functools.partial(residual_mlp, **options),
        differentiated=(0, 1, 2, 3, 4),
        reference=functools.partial(reference.residual_mlp, **options),
        implementations=("xla", "pallas_triton"),
        forward=Cost(products, 3 * row + matrices),
        # x, y and the cotangent read, two gradients written, if all else is computed again
        backward=Cost(2 * products, 5 * row + 2 * matrices),
    )


BFLOAT16 = jnp.dtype(jnp.bfloat16)

CASES: tuple[Case, ...] = (
    # golf_10l_int5mlp has the same shapes
    case("golf_12l_recycled", 98_304, 512, 1536, activation="leaky_relu2", dtype=BFLOAT16),
    case("golf_9l_xsa_ngram", 98_304, 512, 1024, activation="leaky_relu2", dtype=BFLOAT16),
    case("golf_11l_xsa4", 65_536, 512, 1408, activation="relu2", dtype=BFLOAT16),
    case("golf_baseline", 65_536, 512, 1024, activation="relu2", dtype=BFLOAT16),
    case("quickstart", 1_024, 128, 384, activation="relu2", dtype=BFLOAT16),
)
