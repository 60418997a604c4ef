"""The position-wise half of a block."""

import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init


class MLP(nnx.Module):
    """x → relu(x W_up)² W_down, no biases; W_down starts at zero. Squared ReLU: So et al. 2021, arXiv:2109.08668."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.up = nnx.Param(init.fan_in_uniform(rngs.params(), (config.d_model, config.mlp_dim)))
        self.down = nnx.Param(init.zeros((config.mlp_dim, config.d_model)))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = x_BTD @ self.up[...].astype(x_BTD.dtype)
        return jnp.square(jax.nn.relu(h_BTF)) @ self.down[...].astype(x_BTD.dtype)
