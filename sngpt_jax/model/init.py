"""Initial values of parameters. An initializer takes a key and a shape and returns a float32 array."""

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


def fan_in_uniform(key: jax.Array, shape: Shape) -> jax.Array:
    """Uniform on ±1/√fan_in for an [in, out] matrix: the default of a linear layer in PyTorch."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def normal(key: jax.Array, shape: Shape, std: float) -> jax.Array:
    """Independent N(0, std²)."""
    return std * jax.random.normal(key, shape, jnp.float32)


def zeros(shape: Shape) -> jax.Array:
    """All zero: an output projection that starts so leaves its residual branch silent at step 0."""
    return jnp.zeros(shape, jnp.float32)


def ones(shape: Shape) -> jax.Array:
    """All one: gains and scales that start as the identity."""
    return jnp.ones(shape, jnp.float32)
