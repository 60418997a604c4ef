"""Real shapes of the operation: one layer of a recipe's codes, for 8,192 tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sngpt_kernels.case import UNCOUNTED, Case, Cost
from sngpt_kernels.cayley import reference
from sngpt_kernels.cayley.api import Implementation, encode_decode
from sngpt_kernels.cayley.dictionary import Levels, Scheme
from sngpt_kernels.cayley.folding import fold

TOKENS = 8192
REFERENCE_TOKENS = 16  # the reference takes about 0.1 s per token
COUNTED_TOKENS = 64  # whose loops are counted in interpretation
WORK = {  # see `Case.work`
    "cayley_forward": ("decoding", ""),
    "code": ("keys", "decoding"),
    "halve": ("selection", "selection"),
    "write": ("selection", "selection"),
    "take": ("keys", "selection"),
    "add_column": ("products", "keys"),
    "cayley_backward": ("scores", ""),
    "add_columns": ("scores", "scores"),
    "add_features": ("decoding", "decoding"),
    "cayley_bias_gradient": ("bias gradient", ""),
    "add_tile": ("bias gradient", "bias gradient"),
}


def _interpret(scheme: Scheme, dtype: jnp.dtype) -> None:
    """The code of some tokens whose scores are normal, and its gradient."""
    from sngpt_kernels.cayley import pallas_triton

    def code(x: jax.Array, bias: jax.Array) -> jax.Array:
        mean, std = jnp.zeros(scheme.width), jnp.ones(scheme.features)
        return pallas_triton.encode_decode(x, mean, std, bias, scheme, interpret=True)[0]

    def gradients(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
        x_hat, vjp = jax.vjp(code, x, bias)
        return vjp(x_hat)

    x = jax.random.normal(jax.random.key(0), (COUNTED_TOKENS, scheme.width), dtype)
    jax.block_until_ready(jax.jit(gradients)(x, jnp.zeros(scheme.features)))


def case(
    name: str,
    scheme: Scheme,
    dtype: jnp.dtype,
    tokens: int,
    forward: Cost = UNCOUNTED,
    backward: Cost = UNCOUNTED,
) -> Case:
    """The code of `tokens` tokens. The costs are for tables of times."""
    d, features = scheme.width, scheme.features

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        """Statistics and biases as during training, which spread the choices over all features."""
        x, mean, std, bias = jax.random.split(key, 4)
        return (
            jax.random.normal(x, (tokens, d), dtype),
            0.1 * jax.random.normal(mean, (d,)),
            jax.random.uniform(std, (features,), minval=0.5, maxval=1.5),
            0.1 * jax.random.normal(bias, (features,)),
        )

    def run(
        x: jax.Array,
        mean: jax.Array,
        std: jax.Array,
        bias: jax.Array,
        implementation: Implementation | None = None,
    ) -> jax.Array:
        static = vars(scheme) | {"implementation": implementation}
        return encode_decode(x, mean, std, bias, **static)[0]

    def in_float64(
        x: np.ndarray, mean: np.ndarray, std: np.ndarray, bias: np.ndarray
    ) -> np.ndarray:
        return reference.encode_decode(x[:REFERENCE_TOKENS], mean, std, bias, **vars(scheme)).x_hat

    return Case(
        name=name,
        make=make,
        run=run,
        differentiated=(0, 3),
        reference=in_float64,
        implementations=("xla", "pallas_triton"),
        forward=forward,
        backward=backward,
        ties=0.02,
        interpret=partial(_interpret, scheme, dtype),
        work=WORK,
    )


def _case(name: str, levels: Levels, dtype: jnp.dtype) -> Case:
    scheme = Scheme(levels)
    d, features = scheme.width, scheme.features
    # level 0 is two products with square matrices
    scored = d * (2 ** -(-levels[0][0] // 2) + 2 ** (levels[0][0] // 2))
    for level in range(1, len(levels)):
        scored += levels[level - 1][1] * d * fold(levels, "spread", level).member_steps.size
    # x, std and bias, x_hat and the ids; or dx_hat, the ids and std, dx and the bias gradient
    moved = 2 * TOKENS * d * dtype.itemsize + 4 * TOKENS * scheme.active + 2 * 4 * features
    # decoding is signed sums and no matrix products
    forward, backward = Cost(2 * TOKENS * scored, moved), Cost(0, moved)
    return case(name, scheme, dtype, TOKENS, forward, backward)


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
