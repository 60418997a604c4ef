"""Real shapes of the operation: one layer of a recipe's attention for one GPU's microbatch."""

from functools import partial

import jax
import jax.numpy as jnp

from sngpt_kernels.case import Case, Cost
from sngpt_kernels.xsa import reference
from sngpt_kernels.xsa.api import LIBRARIES, attention


def case(
    name: str, B: int, T: int, H: int, K: int, h: int, *, exclusive: bool, dtype: jnp.dtype
) -> Case:
    """Attention of B sequences of T positions, with H query heads and K key/value heads of h."""

    def make(key: jax.Array) -> tuple[jax.Array, ...]:
        heads_and_keys = zip((H, K, K), jax.random.split(key, 3), strict=True)
        return tuple(jax.random.normal(k, (B, T, heads, h), dtype) for heads, k in heads_and_keys)

    static = {"exclusive": exclusive, "scale": h**-0.5}
    low = ("cudnn", *LIBRARIES) if dtype == jnp.bfloat16 else ()
    dot = 2 * h * B * H * T * (T + 1) // 2  # one product up to the diagonal
    queries, keys = B * T * H * h * dtype.itemsize, B * T * K * h * dtype.itemsize
    return Case(
        name=name,
        make=make,
        run=partial(attention, **static),
        differentiated=(0, 1, 2),
        reference=partial(reference.attention, **static),
        implementations=("xla", *low, "pallas_triton"),
        forward=Cost(matmul_flops=2 * dot, bytes=2 * queries + 2 * keys),
        # the scores, their gradient, dq, dk and dv; q, out, its cotangent, dq, and k, v, dk, dv
        backward=Cost(matmul_flops=5 * dot, bytes=4 * queries + 4 * keys),
    )


BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

CASES: tuple[Case, ...] = (
    # golf_12l_recycled has the same shape
    case("golf_9l_xsa_ngram", 48, 2048, 8, 4, 64, exclusive=True, dtype=BFLOAT16),
    case("golf_11l_xsa4", 32, 2048, 8, 4, 64, exclusive=True, dtype=BFLOAT16),
    case("golf_baseline", 64, 1024, 8, 4, 64, exclusive=False, dtype=BFLOAT16),
    case("cayley_small", 32, 1024, 8, 8, 128, exclusive=False, dtype=BFLOAT16),
    case("cayley_large", 8, 1024, 16, 16, 128, exclusive=False, dtype=BFLOAT16),
    case("quickstart", 4, 256, 2, 1, 64, exclusive=True, dtype=FLOAT32),
    case("golf_float32", 8, 2048, 8, 4, 64, exclusive=True, dtype=FLOAT32),
    case("wide_float32", 4, 1024, 8, 4, 128, exclusive=True, dtype=FLOAT32),
)
