"""Muon: momentum whose matrices are orthogonalized by a Newton–Schulz iteration, as an optax
transformation.

Sources: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
(https://kellerjordan.github.io/posts/muon/), and its public PyTorch code, whose coefficients and
steps are kept.
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

# steepest odd quintic at 0 that keeps singular values near 1, not exactly 1
_QUINTIC = (3.4445, -4.7750, 2.0315)

# Amsel et al., "The Polar Express" (arXiv:2505.16932), for singular values from 1e-3 of the
# largest possible on: each is the best odd quintic for the interval that those before it leave,
# the first three for a narrower one, so that they grow faster.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_CONVERGED = (15 / 8, -10 / 8, 3 / 8)  # the best one around 1
# each takes values up to so much above its interval: bfloat16 rounds them there, where a quintic
# runs away
_SAFETY = 1.01


def polynomials(coefficients: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of each iteration's polynomial a x + b x³ + c x⁵."""
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
    """Approximates U Vᵀ of each matrix's singular value decomposition U S Vᵀ.

    After five steps of `quintic` the singular values lie in about [0.65, 1.21], except those that
    began below about 0.0015 of the Frobenius norm, which have not grown that far yet. After five
    of `polar_express` those that began above 0.001 of it lie in [0.84, 1.13]. A zero matrix stays
    zero.

    `matrices` [..., m, n] is float32, else TypeError, and so is the result. `dtype` is that of the
    products' operands and results. In bfloat16 a product is one batched matrix multiplication that
    a GPU runs on its tensor cores, adding up in float32 inside. The result is stored as bfloat16
    (no preferred_element_type): a product of 512 x 512 matrices does about 170 operations a byte,
    fewer than a GPU needs to keep its tensor cores busy, so a float32 result would cost time, and
    the next product would round it all the same. With float32 the products are full float32, not
    TF32.
    """
    if matrices.dtype != jnp.float32:
        raise TypeError(f"newton_schulz takes float32 matrices; found {matrices.dtype}")
    precision = (
        jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT
    )

    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.matmul(left, right, precision=precision)

    tall = matrices.shape[-2] > matrices.shape[-1]
    norms = jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
    x = (matrices / (norms + 1e-7)).astype(dtype)
    x = x.mT if tall else x  # x xᵀ then has the smaller of the two sizes

    def combine(a: float, left: jax.Array, b: float, right: jax.Array) -> jax.Array:
        # in float32: a bfloat16 product would round the coefficients first, 3.4445 to 3.4375
        return (a * left.astype(jnp.float32) + b * right.astype(jnp.float32)).astype(dtype)

    for a, b, c in polynomials(coefficients, steps):
        gram = product(x, x.mT)
        x = combine(a, x, 1.0, product(combine(b, gram, c, product(gram, gram)), x))
    x = x.mT if tall else x
    return x.astype(jnp.float32)


def newton_schulz_flops(shape: tuple[int, ...], steps: int) -> int:
    """Floating-point operations of `newton_schulz` on an array [..., m, n], products only (an
    addition and a multiplication count two): 4 m² n + 2 m³ a step and matrix, with m ≤ n."""
    *stack, m, n = *shape[:-2], *sorted(shape[-2:])
    return math.prod(stack) * steps * (4 * m * m * n + 2 * m**3)


class MuonState(NamedTuple):
    """What Muon remembers: the number of updates taken (int32), the momentum in the parameters'
    tree, and with NorMuon the running mean square [fan_out] of each neuron's update."""

    count: jax.Array  # type: ignore[assignment]  # optax's name for it, though a tuple has a method `count`
    momentum: optax.Updates
    neuron_squares: optax.Updates | None = None


def _evening(squares: jax.Array, running: jax.Array) -> jax.Array:
    """The factors [fan_out] on the columns of an update that divide them by the root of their
    `running` mean squares and keep the norm of the whole; `squares` are the mean squares of the
    update itself, which give both norms."""
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
    """Replaces gradients G of matrices W [fan_in, fan_out] by orthogonalized Nesterov momentum, to
    be descended.

    With μ = `momentum`, a number or a function of the count of updates taken:
    M ← μ M + G, then √max(1, fan_out / fan_in) · O with O = newton_schulz(G + μ M).
    Both lines are float32; M is rounded to `momentum_dtype` where it is kept for the next update.

    A `neuron_beta2` β₂ > 0 evens out what the neurons learn: v ← β₂ v + (1 - β₂) · (mean of O²
    over fan_in) for each of the fan_out, and O / √v, brought back to the norm of O, takes the
    place of O. Source: NorMuon (Li et al., arXiv:2510.05491); that the norm stays is as in the
    public modded-nanogpt speedrun, the paper sets another one.

    Matrices of equal shape, or of shapes that are each other's transposed, are orthogonalized as
    one stack: a few large batched products instead of many small ones. With `mesh` each of its
    devices takes a share of the stack: gradients and momentum lie as `partition_spec(mesh, shape,
    kept_over)` says, the result as the parameters. `stacks` says at what cost. `init` raises
    ValueError naming the first parameter that is not a matrix.
    """

    def init(params: optax.Params) -> MuonState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if len(leaf.shape) != 2:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(f"Muon takes matrices only; {name} has shape {tuple(leaf.shape)}")
        squares = (
            jax.tree.map(lambda p: jnp.zeros(p.shape[1], jnp.float32), params)
            if neuron_beta2
            else None
        )
        return MuonState(
            jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=momentum_dtype), squares
        )

    orthogonalize = functools.partial(
        newton_schulz, steps=ns_steps, dtype=ns_dtype, coefficients=coefficients
    )

    def update(
        grads: optax.Updates, state: MuonState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        mu = momentum(state.count) if callable(momentum) else momentum
        buffers = jax.tree.map(lambda m, g: mu * m.astype(jnp.float32) + g, state.momentum, grads)
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda m, g: g + mu * m, buffers, grads))
        directions = jax.tree.unflatten(
            tree, stacks.map_stacks(orthogonalize, leaves, ns_dtype, mesh, kept_over)
        )
        squares = state.neuron_squares
        if squares is not None:
            now = jax.tree.map(lambda o: jnp.mean(jnp.square(o), axis=0), directions)
            # known to all devices: of matrices that are split, a reduction of these vectors and no
            # more
            if mesh is not None:
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
