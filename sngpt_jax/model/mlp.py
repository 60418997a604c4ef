"""The MLP: the half of a block that maps each position by itself."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from sngpt_kernels.dispatch import current_device

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.layers import linear


def relu2(h: jax.Array) -> jax.Array:
    """relu(h)², elementwise. So et al. 2021, arXiv:2109.08668."""
    return jnp.square(jax.nn.relu(h))


def leaky_relu2(h: jax.Array) -> jax.Array:
    """h² above zero, h²/4 below, elementwise. Source: parameter-golf submission 740."""
    return jnp.square(jax.nn.leaky_relu(h, 0.5))


def gelu(h: jax.Array) -> jax.Array:
    """h Φ(h) with the normal distribution function Φ, exact. arXiv:1606.08415."""
    exact = functools.partial(jax.nn.gelu, approximate=False)
    # the gradient computes Φ again on a GPU, where memory to keep it costs more
    return jax.checkpoint(exact)(h) if current_device().platform == "cuda" else exact(h)


ACTIVATIONS = {"relu2": relu2, "leaky_relu2": leaky_relu2, "gelu": gelu}


class MLP(nnx.Module):
    """x → activation(x W_up) W_down, no biases."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.mlp_activation]
        self.up = nnx.Param(init.matrix(config, rngs.params(), (config.d_model, config.mlp_dim)))
        self.down = nnx.Param(init.residual_output(config, rngs, (config.mlp_dim, config.d_model)))

    def __call__(self, x_BTD: jax.Array, gain_D: jax.Array | None = None) -> jax.Array:
        """The output [B, T, D], its channels times `gain_D`."""
        return linear(self.activation(linear(x_BTD, self.up[...])), self.down[...], gain=gain_D)
