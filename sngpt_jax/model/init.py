"""Initial values of parameters. An initializer takes a key and a shape and returns a float32
array.
"""

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
    """A matrix [in, out] whose singular values are all `gain`: its rows or its columns, whichever
    are fewer, are orthogonal.

    Saxe et al. 2013, arXiv:1312.6120.
    """
    return jax.nn.initializers.orthogonal(gain)(key, shape, jnp.float32)


def matrix(config: ModelConfig, key: jax.Array, shape: Shape, gain: float = 1.0) -> jax.Array:
    """A matrix [in, out] that does not start at zero, by `config.matrix_init`; `gain` is the
    orthogonal one's.
    """
    if config.matrix_init == "normal":
        return normal(key, shape, config.matrix_init_std)
    return (
        orthogonal(key, shape, gain)
        if config.matrix_init == "orthogonal"
        else fan_in_uniform(key, shape)
    )


def residual_output(config: ModelConfig, rngs: nnx.Rngs, shape: Shape) -> jax.Array:
    """A matrix [in, out] whose output is added to the stream: zero, so that its branch is silent
    at step 0.

    With `matrix_init` = normal it is GPT-2's instead: N(0, (std / √(2L))²), for the 2L branches
    that add up.
    """
    if config.matrix_init == "normal":
        return normal(
            rngs.params(), shape, config.matrix_init_std * (2 * config.num_layers) ** -0.5
        )
    return zeros(shape)


def normal(key: jax.Array, shape: Shape, std: float) -> jax.Array:
    """An array of `shape` of independent N(0, std²)."""
    return std * jax.random.normal(key, shape, jnp.float32)


def zeros(shape: Shape) -> jax.Array:
    """An array of `shape`, all zero."""
    return jnp.zeros(shape, jnp.float32)


def ones(shape: Shape) -> jax.Array:
    """An array of `shape`, all one: gains and scales that start as the identity."""
    return jnp.ones(shape, jnp.float32)


def overtone(table_VD: jax.Array) -> jax.Array:
    """The table [V, D] with its k-th singular value replaced by the largest one times k^(-1/2), k
    = 1, 2, …; same vectors.

    Source: parameter-golf submission 333.
    """
    left, values, right = jnp.linalg.svd(table_VD, full_matrices=False)
    spectrum = values[0] * jnp.arange(1, len(values) + 1, dtype=jnp.float32) ** -0.5
    return left @ (spectrum[:, None] * right)


def phase_mix(layer: int, num_layers: int, width: int) -> jax.Array:
    """Residual mixing [2, D] that hands over from the embedding to the stream along the depth:
    rows p and 1 - p.

    p = sigmoid(3 (layer / (num_layers - 1) - 1/2)), from 0.18 at the first layer to 0.82 at the
    last. Source: parameter-golf submission 333.
    """
    p = jax.nn.sigmoid(3.0 * (layer / max(num_layers - 1, 1) - 0.5))
    return jnp.stack([p * ones((width,)), (1.0 - p) * ones((width,))])
