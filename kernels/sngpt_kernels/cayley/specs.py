"""Real shapes of the operation: one layer of a recipe's codes, for 8,192 tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sngpt_kernels.case import Case, Cost
from sngpt_kernels.cayley import reference
from sngpt_kernels.cayley.api import Implementation, encode_decode
from sngpt_kernels.cayley.dictionary import Levels
from sngpt_kernels.cayley.folding import fold

TOKENS = 8192
REFERENCE_TOKENS = 16  # it takes about a tenth of a second for each


def _run(
    levels: Levels,
    x: jax.Array,
    mean: jax.Array,
    std: jax.Array,
    bias: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    return encode_decode(x, mean, std, bias, levels, implementation=implementation)[0]


def _reference(
    levels: Levels, x: np.ndarray, mean: np.ndarray, std: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    return reference.encode_decode(x[:REFERENCE_TOKENS], mean, std, bias, levels).x_hat


def _case(name: str, levels: Levels, dtype: jnp.dtype) -> Case:
    d, features, active = 2 ** levels[0][0], 2 ** levels[-1][0], sum(k for _, k, _ in levels)

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        """Statistics and biases of a model under way: they spread the choices over all features."""
        x, mean, std, bias = jax.random.split(key, 4)
        return (
            jax.random.normal(x, (TOKENS, d), dtype),
            0.1 * jax.random.normal(mean, (d,)),
            jax.random.uniform(std, (features,), minval=0.5, maxval=1.5),
            0.1 * jax.random.normal(bias, (features,)),
        )

    # of level 0: two products with square matrices
    scored = d * (2 ** -(-levels[0][0] // 2) + 2 ** (levels[0][0] // 2))
    for level in range(1, len(levels)):
        scored += levels[level - 1][1] * d * fold(levels, "spread", level).member_steps.size
    vectors, codes, tables = TOKENS * d * dtype.itemsize, 4 * TOKENS * active, 4 * features
    return Case(
        name=name,
        make=make,
        run=partial(_run, levels),
        differentiated=(0, 3),
        reference=partial(_reference, levels),
        implementations=("xla", "pallas_triton"),
        # x, std and bias are read, x_hat and the ids written; the signed sums of the decoding are
        # no products of matrices
        forward=Cost(matmul_flops=2 * TOKENS * scored, bytes=2 * vectors + codes + 2 * tables),
        # dx_hat, the ids and std are read, dx and the bias gradient written
        backward=Cost(matmul_flops=0, bytes=2 * vectors + codes + 2 * tables),
    )


BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
SMALL = ((10, 16, 0), (15, 32, 256), (17, 64, 256))
LARGE = ((11, 16, 0), (15, 32, 256), (17, 64, 256))

CASES: tuple[Case, ...] = (
    _case("cayley_small_3l", SMALL, BFLOAT16),
    _case("cayley_small_2l", SMALL[:2], BFLOAT16),
    _case("cayley_small_1l", SMALL[:1], BFLOAT16),
    _case("cayley_large_3l", LARGE, BFLOAT16),
    _case("cayley_large_2l", LARGE[:2], BFLOAT16),
    _case("quickstart_cayley", ((7, 4, 0), (10, 8, 32), (12, 16, 32)), FLOAT32),
)
