"""Late quantization-aware training: in the last steps of a run the model uses its matrices as the
exported artifact will hold them.

The gradient ignores the rounding (straight-through estimator: Bengio et al.,
https://arxiv.org/abs/1308.3432). The public Parameter Golf scripts do this late in a run, with a
row's largest magnitude as its range.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sngpt_jax.artifact.policy import MATRICES, SMALLEST_SCALE, Policy, largest_code, policy_of
from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config, ConfigError


def fake_quantize(matrix: jax.Array, bits: int, clip_floor: float) -> jax.Array:
    """The nearest matrix to `matrix` [..., in, out], float32, on the grid scale · {-q, …, q}.

    Per output channel, scale = float16(max(max(absmax over in, clip_floor) / q, SMALLEST_SCALE))
    with q = 2^(bits - 1) - 1. Halves are rounded to even.
    """
    reach = jnp.maximum(jnp.max(jnp.abs(matrix), axis=-2, keepdims=True), clip_floor)
    # XLA turns a division by a constant into a product. As a product, it is equal everywhere.
    scale = jnp.maximum(reach * np.float32(1 / largest_code(bits)), SMALLEST_SCALE)
    # rounds to float16 in a form that no compiler may leave out
    scale = jax.lax.reduce_precision(scale, exponent_bits=5, mantissa_bits=10)
    # Nothing needs clipping: a scale rounded down gives a quotient of at most q · (1 + 2^-11), less
    # than q + 1/2. The exporter also multiplies with 1 / scale, so that ties fall as in training.
    return scale * jnp.round(matrix * (1 / scale))


def _policy(path: tuple[object, ...], leaf: jax.Array, config: Config) -> Policy | None:
    """How the exporter stores a matrix on a grid; None for another tensor."""
    policy = policy_of(path_name(path), leaf.shape, config)
    return policy if policy.group in MATRICES and policy.has_grid else None


def check(params: optax.Params, config: Config) -> None:
    """Raises `ConfigError` if the training would imitate nothing that the exporter does to
    `params`, real or abstract.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not any(_policy(path, leaf, config) for path, leaf in leaves):
        raise ConfigError(
            "optim.qat_below has no grid to train for: export.mlp_bits, attention_bits,"
            " projection_bits and passthrough_size leave every matrix as it is"
        )
    if config.export.clip == "sd" or config.export.gptq:
        raise ConfigError(
            "optim.qat_below imitates ranges near a row's largest magnitude; train with export.clip"
            " = row_max, percentile or search and without export.gptq. The export may use either"
        )


def on_grid(params: optax.Params, config: Config) -> optax.Params:
    """`params` with each matrix that the exporter stores on a grid moved to the nearest points."""

    def replace(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        if policy := _policy(path, leaf, config):
            return fake_quantize(leaf, policy.bits, config.export.clip_floor)
        return leaf

    return jax.tree_util.tree_map_with_path(replace, params)


def straight_through(
    params: optax.Params, config: Config, switch: jax.typing.ArrayLike
) -> optax.Params:
    """`on_grid(params)` if the boolean scalar `switch` is true, otherwise `params`.

    `switch` must be traced: one compiled step then serves both cases, and the rounding is not
    folded away. The gradient with respect to `params` equals the one with respect to the result, so
    a step with several microbatches calls this function once.
    """

    def select(w: jax.Array, grid: jax.Array) -> jax.Array:
        value = jnp.where(switch, grid, w)
        # the bracket is exactly 0, so the result is exactly `value`; w + (value - w) would round
        return jax.lax.stop_gradient(value) - (jax.lax.stop_gradient(w) - w)

    return jax.tree.map(select, params, on_grid(params, config))
