"""Late quantization-aware training: the last steps of a run see their matrices as the exported
artifact will hold them.

The grid is symmetric with one scale for each output channel, `scale · {-q_max, …, q_max}` with
q_max = 2^(bits - 1) - 1. The gradient passes the rounding unchanged (straight-through estimator:
Bengio et al., https://arxiv.org/abs/1308.3432; late in a run with a row's largest magnitude as the
range: the public Parameter Golf scripts).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sngpt_jax.artifact.policy import MATRICES, SMALLEST_SCALE, largest_code, policy_of
from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config, ConfigError


def fake_quantize(matrix: jax.Array, bits: int, clip_floor: float) -> jax.Array:
    """The matrix nearest to `matrix` [..., in, out], float32, on the grid of `bits` that its
    output channels span.

    scale = float16(max(max(absmax over in, clip_floor) / q, SMALLEST_SCALE)), for each output
    channel; result = scale · round(matrix · float32(1 / scale)), float32, halves rounded to even.
    Zeros stay zero.
    """
    reach = jnp.maximum(jnp.max(jnp.abs(matrix), axis=-2, keepdims=True), clip_floor)
    # times 1 / q is what XLA makes of a division by a constant: written out, it is the same
    # float32 everywhere
    scale = jnp.maximum(reach * np.float32(1 / largest_code(bits)), SMALLEST_SCALE)
    # to float16 and back, in a form that no compiler may leave out as needless
    scale = jax.lax.reduce_precision(scale, exponent_bits=5, mantissa_bits=10)
    # nothing to clip: a scale rounded down to float16 leaves a quotient of at most q · (1 +
    # 2^-11), less than q + 1/2 and times 1 / scale, likewise what XLA makes of the division: so
    # ties fall in the exporter as they fell in training
    return scale * jnp.round(matrix * (1 / scale))


def check(params: optax.Params, config: Config) -> None:
    """Raises `ConfigError` where late quantization-aware training would imitate nothing that the
    exporter does.

    `params` may be shapes alone.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    policies = [policy_of(path_name(path), leaf.shape, config) for path, leaf in leaves]
    if not any(policy.group in MATRICES and policy.has_grid for policy in policies):
        raise ConfigError(
            "optim.qat_below has no grid to train for: export.mlp_bits, attention_bits,"
            " projection_bits and passthrough_size leave every matrix as it is"
        )
    if config.export.clip == "sd" or config.export.gptq:
        raise ConfigError(
            "optim.qat_below imitates ranges near a row's largest magnitude; train with export.clip"
            " = row_max, percentile or search, without export.gptq (either may be used in the"
            " export)"
        )


def on_grid(params: optax.Params, config: Config) -> optax.Params:
    """`params` with each matrix that `config` exports on a grid replaced by its nearest one there;
    tables stay as they are.
    """

    def replace(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        policy = policy_of(path_name(path), leaf.shape, config)
        if policy.group in MATRICES and policy.has_grid:
            return fake_quantize(leaf, policy.bits, config.export.clip_floor)
        return leaf

    return jax.tree_util.tree_map_with_path(replace, params)


def straight_through(
    params: optax.Params, config: Config, switch: jax.typing.ArrayLike
) -> optax.Params:
    """`on_grid(params)` where the boolean scalar `switch` is true, else `params`, and either way
    with the gradient of `params`.

    `switch` is to be traced: one compiled step serves both cases, and the rounding is not folded
    away. The gradient with respect to the result is the one with respect to `params`, so that a
    step with several microbatches calls this once.
    """

    def select(w: jax.Array, grid: jax.Array) -> jax.Array:
        value = jnp.where(switch, grid, w)
        # the bracket is exactly 0, so this is `value` to the last bit; w + (value - w) would round
        return jax.lax.stop_gradient(value) - (jax.lax.stop_gradient(w) - w)

    return jax.tree.map(select, params, on_grid(params, config))
