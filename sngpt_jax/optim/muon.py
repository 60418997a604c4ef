"""Muon as an optax transformation: a Newton–Schulz iteration orthogonalizes the momentum.

Sources: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon/), and its public PyTorch code, which gives coefficients
and steps.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.cluster.mesh import PARAMETER_AXES
from sngpt_jax.optim import stacks

Coefficients = Literal["quintic", "polar_express"]

# the odd quintic that is steepest at 0 and keeps singular values near 1, though not exactly 1
_QUINTIC = (3.4445, -4.7750, 2.0315)

# Amsel et al., "The Polar Express" (arXiv:2505.16932), for singular values above 1e-3 of the
# largest possible. Each polynomial is the best odd quintic for the interval that the earlier ones
# leave; the first three take a narrower interval, so that small values grow faster.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_CONVERGED = (15 / 8, -10 / 8, 3 / 8)  # the best polynomial around 1
# bfloat16 may round a value above its interval by this factor, and a quintic diverges there
_SAFETY = 1.01


def polynomials(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """The coefficients (a, b, c) of each iteration's polynomial a x + b x³ + c x⁵."""
    if coefficients == "quintic":
        return [_QUINTIC] * steps
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:steps]]
    return safe + [_CONVERGED] * (steps - len(safe))


def newton_schulz(
    matrices: jax.Array,
    steps: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    coefficients: Coefficients = "quintic",
) -> jax.Array:
    """Approximates U Vᵀ for each matrix U S Vᵀ (its singular value decomposition).

    After five steps of `quintic` the singular values lie in about [0.65, 1.21], unless they began
    below about 0.0015 of the Frobenius norm. After five steps of `polar_express` the values that
    began above 0.001 of the norm lie in [0.84, 1.13]. A zero matrix stays zero.

    `matrices` [..., m, n] and the result are float32. `dtype` is that of the products' operands and
    results. In bfloat16 a GPU's tensor cores add up in float32; a float32 result would cost time,
    and the next product would round it. With float32 the products are full float32, not TF32.
    """
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
    product = functools.partial(jnp.matmul, precision=precision)
    tall = matrices.shape[-2] > matrices.shape[-1]
    norms = jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
    x = (matrices / (norms + 1e-7)).astype(dtype)
    x = x.mT if tall else x  # so that x xᵀ has the smaller size

    def combine(a: float, left: jax.Array, b: float, right: jax.Array) -> jax.Array:
        # in float32: bfloat16 would round the coefficients, 3.4445 to 3.4375
        return (a * left.astype(jnp.float32) + b * right.astype(jnp.float32)).astype(dtype)

    for a, b, c in polynomials(coefficients, steps):
        gram = product(x, x.mT)
        x = combine(a, x, 1.0, product(combine(b, gram, c, product(gram, gram)), x))
    return (x.mT if tall else x).astype(jnp.float32)


def newton_schulz_flops(shape: tuple[int, ...], steps: int) -> int:
    """Floating-point operations of the products in `newton_schulz`, a multiply-add as two: per
    step and matrix 4 m² n + 2 m³, m ≤ n.
    """
    *stack, m, n = *shape[:-2], *sorted(shape[-2:])
    return math.prod(stack) * steps * (4 * m * m * n + 2 * m**3)


class MuonState(NamedTuple):
    """The state between updates."""

    # int32, updates taken; optax's name for it, though a tuple has a method `count`
    count: jax.Array  # type: ignore[assignment]
    momentum: optax.Updates
    # with NorMuon: the running mean square [fan_out] of each neuron's update
    neuron_squares: optax.Updates | None = None


def _evening(squares: jax.Array, running: jax.Array) -> jax.Array:
    """The factors [fan_out] on an update's columns: 1 / √running, scaled to keep the update's norm,
    from the current and the running mean squares of the columns.
    """
    factors = jax.lax.rsqrt(running + 1e-10)
    return factors * jnp.sqrt(jnp.sum(squares) / (jnp.sum(squares * factors**2) + 1e-20))


def scale_by_muon(
    momentum: float | Callable[[jax.Array], jax.Array],
    ns_steps: int = 5,
    ns_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    momentum_dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    coefficients: Coefficients = "quintic",
    neuron_beta2: float = 0.0,
    mesh: Mesh | None = None,
    kept_over: tuple[str, ...] = PARAMETER_AXES,
) -> optax.GradientTransformation:
    """Replaces the gradient G of a matrix W [fan_in, fan_out] by orthogonalized Nesterov momentum.

    With μ = `momentum`, a number or a function of the updates taken: M ← μ M + G, and the result is
    √max(1, fan_out / fan_in) · O with O = newton_schulz(G + μ M). M is kept in `momentum_dtype`.

    A `neuron_beta2` β₂ > 0 evens out the neurons' updates: v ← β₂ v + (1 - β₂) · (mean of O² over
    fan_in) per neuron, and O / √v, scaled to the norm of O, replaces O. Source: NorMuon (Li et al.,
    arXiv:2510.05491); that the norm is kept follows the public modded-nanogpt speedrun.

    Matrices of equal or transposed shape are orthogonalized as one stack (`stacks.map_stacks`),
    over the devices of `mesh` if it is given. `init` raises ValueError with the name of the first
    parameter that is not a matrix.
    """

    def init(params: optax.Params) -> MuonState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if len(leaf.shape) != 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"Muon takes matrices only; {name} has shape {tuple(leaf.shape)}")
        squares = None
        if neuron_beta2:
            squares = jax.tree.map(lambda p: jnp.zeros(p.shape[1], jnp.float32), params)
        kept = optax.tree.zeros_like(params, dtype=momentum_dtype)
        return MuonState(jnp.zeros((), jnp.int32), kept, squares)

    orthogonalize = functools.partial(
        newton_schulz, steps=ns_steps, dtype=ns_dtype, coefficients=coefficients
    )

    def update(
        grads: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        mu = stacks.read_by_all(momentum(state.count) if callable(momentum) else momentum)
        buffers = jax.tree.map(lambda m, g: mu * m.astype(jnp.float32) + g, state.momentum, grads)
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda m, g: g + mu * m, buffers, grads))
        leaves = stacks.map_stacks(orthogonalize, leaves, ns_dtype, mesh, kept_over)
        directions = jax.tree.unflatten(tree, leaves)
        squares = state.neuron_squares
        if squares is not None:
            now = jax.tree.map(lambda o: jnp.mean(jnp.square(o), axis=0), directions)
            if mesh is not None:  # on all devices: split matrices then reduce only these vectors
                now = jax.lax.with_sharding_constraint(now, NamedSharding(mesh, P()))
            squares = jax.tree.map(
                lambda v, s: neuron_beta2 * v + (1.0 - neuron_beta2) * s, squares, now
            )
            directions = jax.tree.map(
                lambda o, s, v: _evening(s, v)[None, :] * o, directions, now, squares
            )
        directions = jax.tree.map(
            lambda o: math.sqrt(max(1.0, o.shape[1] / o.shape[0])) * o, directions
        )
        kept = optax.tree.cast(buffers, momentum_dtype)
        return directions, MuonState(optax.safe_increment(state.count), kept, squares)

    return optax.GradientTransformation(init, update)
