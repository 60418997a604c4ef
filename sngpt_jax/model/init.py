"""Initial values of parameters: float32 arrays from a key and a shape."""

import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig

Shape = tuple[int, ...]


def normal(key: jax.Array, shape: Shape, std: float) -> jax.Array:
    """Independent samples of N(0, std²)."""
    return std * jax.random.normal(key, shape, jnp.float32)


def orthogonal(key: jax.Array, shape: Shape, gain: float = 1.0) -> jax.Array:
    """A matrix [in, out] whose singular values are all `gain`. Saxe et al., arXiv:1312.6120."""
    return jax.nn.initializers.orthogonal(gain)(key, shape, jnp.float32)


def matrix(config: ModelConfig, key: jax.Array, shape: Shape, gain: float = 1.0) -> jax.Array:
    """A matrix [in, out] by `config.matrix_init`; only orthogonal uses `gain`.

    fan_in_uniform is uniform on ±1/√in: the default of a linear layer in PyTorch.
    """
    match config.matrix_init:
        case "normal":
            return normal(key, shape, config.matrix_init_std)
        case "orthogonal":
            return orthogonal(key, shape, gain)
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def residual_output(config: ModelConfig, rngs: nnx.Rngs, shape: Shape) -> jax.Array:
    """A matrix [in, out] whose output is added to the stream: zero.

    With `matrix_init` = normal it is N(0, (std / √(2L))²), as in GPT-2, because 2L branches add up.
    """
    if config.matrix_init != "normal":
        return jnp.zeros(shape)
    return normal(rngs.params(), shape, config.matrix_init_std * (2 * config.num_layers) ** -0.5)


def overtone(table_VD: jax.Array) -> jax.Array:
    """The table [V, D] with singular values σ₁ k^(-1/2), k = 1, 2, …, and unchanged vectors.

    Source: parameter-golf submission 333.
    """
    left, values, right = jnp.linalg.svd(table_VD, full_matrices=False)
    spectrum = values[0] * jnp.arange(1, len(values) + 1, dtype=jnp.float32) ** -0.5
    return left @ (spectrum[:, None] * right)


def phase_mix(layer: int, num_layers: int, width: int) -> jax.Array:
    """Residual mixing [2, D] with rows p and 1 - p: from the embedding to the stream with depth.

    p = sigmoid(3 (layer / (num_layers - 1) - 1/2)) rises from 0.18 to 0.82. Source: parameter-golf
    submission 333.
    """
    p = jax.nn.sigmoid(3.0 * (layer / max(num_layers - 1, 1) - 0.5))
    return jnp.stack([p * jnp.ones((width,)), (1.0 - p) * jnp.ones((width,))])
