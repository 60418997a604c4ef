"""Muon: momentum whose matrices are orthogonalized by a Newton–Schulz iteration, as an optax transformation.

Sources: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon/), and its public PyTorch code, whose coefficients and steps are kept.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

_A, _B, _C = 3.4445, -4.7750, 2.0315  # steepest odd quintic at 0 that keeps singular values near 1, not exactly 1


def newton_schulz(matrices: jax.Array, steps: int, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """Approximates U Vᵀ of each matrix's singular value decomposition U S Vᵀ.

    After five steps the singular values lie in about [0.65, 1.21], except those that began below about 0.0015 of the
    Frobenius norm, which have not grown that far yet. A zero matrix stays zero.

    `matrices` [..., m, n] is float32, else TypeError, and so is the result. `dtype` is that of the products' operands and
    results. In bfloat16 a product is one batched matrix multiplication that a GPU runs on its tensor cores, adding up in
    float32 inside. The result is stored as bfloat16 (no preferred_element_type): a product of 512 x 512 matrices does
    about 170 operations a byte, fewer than a GPU needs to keep its tensor cores busy, so a float32 result would cost
    time, and the next product would round it all the same. With float32 the products are full float32, not TF32.
    """
    if matrices.dtype != jnp.float32:
        raise TypeError(f"newton_schulz takes float32 matrices; found {matrices.dtype}")
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision=precision)

    tall = matrices.shape[-2] > matrices.shape[-1]
    norms = jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
    x = (matrices / (norms + 1e-7)).astype(dtype)
    x = x.mT if tall else x  # x xᵀ then has the smaller of the two sizes

    def combine(a: float, left: jax.Array, b: float, right: jax.Array) -> jax.Array:
        # in float32: a bfloat16 product would round the coefficients first, 3.4445 to 3.4375
        return (a * left.astype(jnp.float32) + b * right.astype(jnp.float32)).astype(dtype)

    for _ in range(steps):
        gram = product(x, x.mT)
        x = combine(_A, x, 1.0, product(combine(_B, gram, _C, product(gram, gram)), x))
    x = x.mT if tall else x
    return x.astype(jnp.float32)


def newton_schulz_flops(shape: tuple[int, ...], steps: int) -> int:
    """Floating-point operations of `newton_schulz` on an array [..., m, n], products only (an addition and a multiplication
    count two): 4 m² n + 2 m³ a step and matrix, with m ≤ n."""
    *stack, m, n = *shape[:-2], *sorted(shape[-2:])
    return math.prod(stack) * steps * (4 * m * m * n + 2 * m**3)


class MuonState(NamedTuple):
    """What Muon remembers: the number of updates taken (int32) and the momentum, in the parameters' tree."""

    count: jax.Array  # type: ignore[assignment]  # optax's name for it, though a tuple has a method `count`
    momentum: optax.Updates


def scale_by_muon(
    momentum: float | Callable[[jax.Array], jax.Array],
    ns_steps: int = 5,
    ns_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    momentum_dtype: jax.typing.DTypeLike = jnp.float32,
) -> optax.GradientTransformation:
    """Replaces gradients G of matrices W [fan_in, fan_out] by orthogonalized Nesterov momentum, to be descended.

    With μ = `momentum`, a number or a function of the count of updates taken:
    M ← μ M + G, then √max(1, fan_out / fan_in) · newton_schulz(G + μ M).
    Both lines are float32; M is rounded to `momentum_dtype` where it is kept for the next update.

    Matrices of equal shape are orthogonalized as one stack: a few large batched products instead of many small ones.
    `init` raises ValueError naming the first parameter that is not a matrix.
    """

    def init(params: optax.Params) -> MuonState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if len(leaf.shape) != 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"Muon takes matrices only; {name} has shape {tuple(leaf.shape)}")
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=momentum_dtype))

    def update(grads: optax.Updates, state: MuonState, params: optax.Params | None = None) -> tuple[optax.Updates, MuonState]:
        del params
        mu = momentum(state.count) if callable(momentum) else momentum
        buffers = jax.tree.map(lambda m, g: mu * m.astype(jnp.float32) + g, state.momentum, grads)
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda m, g: g + mu * m, buffers, grads))
        same_shape = defaultdict(list)
        for index, leaf in enumerate(leaves):
            same_shape[leaf.shape].append(index)
        for (fan_in, fan_out), indices in same_shape.items():
            stack = newton_schulz(jnp.stack([leaves[i] for i in indices]), ns_steps, ns_dtype)
            stack = math.sqrt(max(1.0, fan_out / fan_in)) * stack
            for i, matrix in zip(indices, stack, strict=True):
                leaves[i] = matrix
        kept = optax.tree.cast(buffers, momentum_dtype)
        return jax.tree.unflatten(tree, leaves), MuonState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformation(init, update)
