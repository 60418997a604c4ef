"""Real shapes of the operation: half a block of a recipe for one GPU's microbatch."""

import jax
import jax.numpy as jnp
import numpy as np

from sngpt_kernels.case import Case, Cost
from sngpt_kernels.stream import reference
from sngpt_kernels.stream.api import Implementation, sum_norm

EPS = 1.1920929e-7


def case(
    name: str,
    tokens: int,
    D: int,
    *,
    weighted: bool,
    gain: bool = False,
    shared: bool = False,
    dtype: jnp.dtype,
) -> Case:
    """The sum of two arrays; `weighted` mixes in x0 and a bias, by vectors. The output is [u, n].

    These are the sums in front of an MLP and in front of an attention. `shared` has the norm for
    three uses and the first group's sum in the output, too, as models ask for them.
    """
    arrays = 3 if weighted else 2

    def grouped(*arguments: jax.Array) -> tuple[list[list[jax.Array]], list[jax.Array | None]]:
        x, vectors = arguments[:arrays], arguments[arrays]
        if not weighted:
            return [list(x)], [None]
        return [list(x[:2]), [x[2]], []], [vectors[0], vectors[1], vectors[2]]

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        of_arrays, of_vectors = jax.random.split(key)
        x = jax.random.normal(of_arrays, (arrays, tokens, D), dtype)
        return *x, jax.random.uniform(of_vectors, (4, D), minval=0.5, maxval=1.5)

    def run(*arguments: jax.Array, implementation: Implementation | None = None) -> jax.Array:
        last = arguments[-1][3] if gain else None
        groups = grouped(*arguments)
        results = sum_norm(
            *groups,
            last,
            eps=EPS,
            uses=3 if shared else 1,
            first=shared,
            implementation=implementation,
        )
        return jnp.concatenate(results, axis=1)

    def in_float64(*arguments: np.ndarray) -> np.ndarray:
        last = arguments[-1][3] if gain else None
        sums, weights = grouped(*map(np.asarray, arguments))  # type: ignore[arg-type]
        u, n = reference.sum_norm(sums, weights, last, eps=EPS)
        again = [n, n, np.sum(np.asarray(sums[0], np.float64), axis=0)] if shared else []
        return np.concatenate([u, n, *again], axis=1)

    size = tokens * D * dtype.itemsize
    return Case(
        name=name,
        make=make,
        run=run,
        differentiated=tuple(range(arrays + (weighted or gain))),
        reference=in_float64,
        implementations=("xla", "pallas_triton"),
        forward=Cost(0, (arrays + 2) * size),
        # the arrays and two cotangents read, a gradient of each group written
        backward=Cost(0, (7 if weighted else 4) * size),
    )


BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

CASES: tuple[Case, ...] = (
    # golf_9l_xsa_ngram has the same shapes
    case("golf_12l_recycled", 98_304, 512, weighted=True, dtype=BFLOAT16),
    case("golf_12l_recycled_mlp", 98_304, 512, weighted=False, dtype=BFLOAT16),
    case("cayley_small_3l", 32_768, 768, weighted=False, gain=True, dtype=BFLOAT16),
    case("quickstart", 1_024, 128, weighted=True, dtype=FLOAT32),
)
