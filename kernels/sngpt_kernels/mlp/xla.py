"""The operation in plain jax, for any device."""

import jax
import jax.numpy as jnp
from jax import Array

from sngpt_kernels.stream import xla as stream


def relu2(h: Array) -> Array:
    """relu(h)², elementwise. So et al. 2021, arXiv:2109.08668."""
    return jnp.square(jax.nn.relu(h))


def leaky_relu2(h: Array) -> Array:
    """h² above zero, h²/4 below, elementwise. Source: parameter-golf submission 740."""
    return jnp.square(jax.nn.leaky_relu(h, 0.5))


ACTIVATIONS = {"relu2": relu2, "leaky_relu2": leaky_relu2}


def residual_mlp(
    x: Array,
    y: Array,
    out: Array,
    up: Array,
    down: Array,
    activation: str,
    eps: float,
    scale: float,
) -> Array:
    """`api.residual_mlp` of valid arguments. Each product and sum is rounded."""
    u, n = stream.sum_norm(((x, y @ out),), (None,), None, eps, scale)
    return u + ACTIVATIONS[activation](n @ up) @ down
