"""Real shapes of the operation: one layer of a recipe for one GPU's microbatch."""

import jax
import jax.numpy as jnp
import numpy as np

from sngpt_kernels.case import Case, Cost
from sngpt_kernels.rotary import reference
from sngpt_kernels.rotary.api import Implementation, prepare

EPS = 1.1920929e-7


def case(
    name: str,
    B: int,
    T: int,
    H: int,
    K: int,
    h: int,
    *,
    rotary: int,
    gated: bool = False,
    dtype: jnp.dtype,
) -> Case:
    """B sequences of T positions; H query, K key and K value heads of h, `rotary` of it rotated.

    `gated` has one head more, for the logits of a gate. The output is the heads side by side, since
    a case has one output.
    """

    values = (K, 1) if gated else (K,)
    N, copied = H + K + sum(values), sum(values)

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        of_x, of_gain = jax.random.split(key)
        pairs = jnp.arange(rotary // 2, dtype=jnp.float32)
        angles = jnp.outer(jnp.arange(T), 10_000.0 ** (-2 * pairs / rotary))[None]
        x = jax.random.normal(of_x, (B, T, N, h), dtype)
        gain = jax.random.uniform(of_gain, (H,), minval=0.5, maxval=2.0)
        return x, gain, jnp.cos(angles), jnp.sin(angles)

    def run(
        x: jax.Array,
        gain: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        implementation: Implementation | None = None,
    ) -> jax.Array:
        heads = prepare(x, gain, cos, sin, eps=EPS, values=values, implementation=implementation)
        return jnp.concatenate(heads, axis=2)

    def in_float64(x: np.ndarray, gain: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        return reference.prepare(x, gain, cos, sin, eps=EPS, values=copied)

    heads, tables = B * T * N * h * dtype.itemsize, 2 * T * rotary // 2 * 4
    return Case(
        name=name,
        make=make,
        run=run,
        differentiated=(0, 1),
        reference=in_float64,
        implementations=("xla", "pallas_triton"),
        forward=Cost(0, 2 * heads + tables),
        backward=Cost(0, 3 * heads - B * T * copied * h * dtype.itemsize + tables),
    )


BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

CASES: tuple[Case, ...] = (
    case("golf_9l_xsa_ngram", 48, 2048, 8, 4, 64, rotary=16, dtype=BFLOAT16),
    case("golf_12l_recycled", 48, 2048, 8, 4, 64, rotary=16, gated=True, dtype=BFLOAT16),
    case("golf_11l_xsa4", 32, 2048, 8, 4, 64, rotary=64, dtype=BFLOAT16),
    case("golf_baseline", 64, 1024, 8, 4, 64, rotary=64, dtype=BFLOAT16),
    case("quickstart", 4, 256, 2, 1, 64, rotary=64, dtype=FLOAT32),
)
