"""Initial values of parameters: functions of a key and a shape that return a float32 array."""

import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig

Shape = tuple[int, ...]


def fan_in_uniform(key: jax.Array, shape: Shape) -> jax.Array:
    """Uniform on ±1/√fan_in for an [in, out] matrix: the default of a linear layer in PyTorch."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def orthogonal(key: jax.Array, shape: Shape, gain: float = 1.0) -> jax.Array:
    """A matrix [in, out] whose singular values are all `gain`. Saxe et al. 2013,
    arXiv:1312.6120.
    """
    return jax.nn.initializers.orthogonal(gain)(key, shape, jnp.float32)


def matrix(config: ModelConfig, key: jax.Array, shape: Shape, gain: float = 1.0) -> jax.Array:
    """A matrix [in, out] by `config.matrix_init`; only orthogonal uses `gain`."""
    match config.matrix_init:
        case "normal":
            return normal(key, shape, config.matrix_init_std)
        case "orthogonal":
            return orthogonal(key, shape, gain)
    return fan_in_uniform(key, shape)


def residual_output(config: ModelConfig, rngs: nnx.Rngs, shape: Shape) -> jax.Array:
    """A matrix [in, out] whose output is added to the stream: zero, so that the branch adds nothing
    at step 0.

    With `matrix_init` = normal it is N(0, (std / √(2L))²), as in GPT-2, because 2L branches add up.
    """
    if config.matrix_init != "normal":
        return zeros(shape)
    return normal(rngs.params(), shape, config.matrix_init_std * (2 * config.num_layers) ** -0.5)


def normal(key: jax.Array, shape: Shape, std: float) -> jax.Array:
    """Independent samples of N(0, std²)."""
    return std * jax.random.normal(key, shape, jnp.float32)


def zeros(shape: Shape) -> jax.Array:
    """Zeros."""
    return jnp.zeros(shape, jnp.float32)


def ones(shape: Shape) -> jax.Array:
    """Ones: gains and scales that start as the identity."""
    return jnp.ones(shape, jnp.float32)


def overtone(table_VD: jax.Array) -> jax.Array:
    """The table [V, D] with singular values σ₁ k^(-1/2), k = 1, 2, …, and unchanged vectors.

    Source: parameter-golf submission 333.
    """
    left, values, right = jnp.linalg.svd(table_VD, full_matrices=False)
    spectrum = values[0] * jnp.arange(1, len(values) + 1, dtype=jnp.float32) ** -0.5
    return left @ (spectrum[:, None] * right)


def phase_mix(layer: int, num_layers: int, width: int) -> jax.Array:
    """Residual mixing [2, D] with rows p and 1 - p: from the embedding to the stream with depth.

    p = sigmoid(3 (layer / (num_layers - 1) - 1/2)) rises from 0.18 in the first layer to 0.82 in
    the last. Source: parameter-golf submission 333.
    """
    p = jax.nn.sigmoid(3.0 * (layer / max(num_layers - 1, 1) - 0.5))
    return jnp.stack([p * ones((width,)), (1.0 - p) * ones((width,))])
