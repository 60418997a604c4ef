"""Late quantization-aware training: the last steps of a run see their matrices as the exported artifact will hold them.

The grid is symmetric with one scale for each output channel, `scale · {-q_max, …, q_max}` with q_max = 2^(bits - 1) - 1. The
gradient passes the rounding unchanged (straight-through estimator: Bengio et al., https://arxiv.org/abs/1308.3432; late in
a run with a row's largest magnitude as the range: the public Parameter Golf scripts).
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sngpt_jax.config import ExportConfig
from sngpt_jax.parallel import path_name

# Whole path of a matrix -> field of ExportConfig with its bits. A parameter that no rule names has no grid.
RULES: tuple[tuple[str, str], ...] = (
    (r"blocks/\d+/mlp/(up|down)", "mlp_bits"),
    (r"blocks/\d+/attn/(query|key|value|out)", "attention_bits"),
    (r"(bigram|value_embed)/proj", "projection_bits"),
)
NO_GRID = 16  # bits of a matrix that is exported in half precision

# The smallest normal float16, about 6.1e-5. Scales are exported as float16, and below it they lose bits and vanish.
SMALLEST_SCALE = float(np.finfo(np.float16).smallest_normal)


def fake_quantize(matrix: jax.Array, bits: int, scale_floor: float) -> jax.Array:
    """The matrix nearest to `matrix` [..., in, out], float32, on the grid of `bits` that its output channels span.

    scale = float16(max(absmax over in / q_max, scale_floor, SMALLEST_SCALE)), for each output channel;
    result = scale · round(matrix / scale), float32, halves rounded to even. Zeros stay zero.
    """
    q_max = 2 ** (bits - 1) - 1
    # times 1 / q_max is what XLA makes of a division by a constant: written out, it is the same float32 everywhere
    scale = jnp.max(jnp.abs(matrix), axis=-2, keepdims=True) * np.float32(1 / q_max)
    scale = jnp.maximum(scale, max(scale_floor, SMALLEST_SCALE))
    # to float16 and back, in a form that no compiler may leave out as needless
    scale = jax.lax.reduce_precision(scale, exponent_bits=5, mantissa_bits=10)
    # nothing to clip: a scale rounded down to float16 leaves a quotient of at most q_max · (1 + 2^-11), less than q_max + 1/2
    return scale * jnp.round(matrix / scale)


def has_grid(export: ExportConfig) -> bool:
    """Whether any matrix is exported on a grid."""
    return any(getattr(export, field) != NO_GRID for _, field in RULES)


def on_grid(params: optax.Params, export: ExportConfig) -> optax.Params:
    """`params` with each matrix that `export` puts on a grid replaced by its nearest one there."""

    def replace(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
        field = next((field for pattern, field in RULES if re.fullmatch(pattern, path_name(path))), None)
        bits = getattr(export, field) if field else NO_GRID
        return leaf if bits == NO_GRID else fake_quantize(leaf, bits, export.scale_floor)

    return jax.tree_util.tree_map_with_path(replace, params)


def straight_through(params: optax.Params, export: ExportConfig, switch: jax.typing.ArrayLike) -> optax.Params:
    """`on_grid(params)` where the boolean scalar `switch` is true, else `params`, and either way with the gradient of `params`.

    `switch` is to be traced: one compiled step serves both cases, and the rounding is not folded away. The gradient with
    respect to the result is the one with respect to `params`, so that a step with several microbatches calls this once.
    """

    def select(w: jax.Array, grid: jax.Array) -> jax.Array:
        value = jnp.where(switch, grid, w)
        # the bracket is exactly 0, so this is `value` to the last bit; w + (value - w) would round
        return jax.lax.stop_gradient(value) - (jax.lax.stop_gradient(w) - w)

    return jax.tree.map(select, params, on_grid(params, export))
