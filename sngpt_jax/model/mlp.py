"""The MLP: the half of a block that maps each position by itself."""

import functools
from typing import Any, cast

import jax
from flax import nnx
from sngpt_kernels.dispatch import current_device
from sngpt_kernels.mlp import api
from sngpt_kernels.mlp.xla import leaky_relu2, relu2

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.layers import Observed, chosen_by, linear, operand
from sngpt_jax.model.stream import Stream


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
        self.name = config.mlp_activation
        self.implementation = None if config.mlp == "auto" else config.mlp
        self.up = nnx.Param(init.matrix(config, rngs.params(), (config.d_model, config.mlp_dim)))
        self.down = nnx.Param(init.residual_output(config, rngs, (config.mlp_dim, config.d_model)))

    def __call__(self, x_BTD: jax.Array, gain_D: jax.Array | None = None) -> jax.Array:
        """The output [B, T, D], its channels times `gain_D`."""
        return linear(self.activation(linear(x_BTD, self.up[...])), self.down[...], gain=gain_D)

    def residual(
        self,
        x: Stream,
        y_BTE: jax.Array,
        out: jax.Array | Observed,
        gains: tuple[jax.Array, jax.Array],
        *,
        eps: float,
        scale: float,
    ) -> Any:
        """u plus this MLP of norm(u), where u is the stream x plus the attention's output product.

        y [B, T, E] are the heads, `out` [E, D] is the product's matrix. `gains` [D] multiply the
        columns of `out` and of this MLP's output. `scale` is the norm's.
        """
        matrices, dtype = [self.up[...], self.down[...]], y_BTE.dtype
        # calibration sees the inputs of the matrices that it observes
        if not isinstance(out, Observed) and not any(isinstance(m, Observed) for m in matrices):
            up, down = matrices
            widths = *out.shape, up.shape[1]
            with chosen_by("mlp"):
                chosen = api.choose(dtype, widths, self.name, self.implementation)
            if chosen != "xla":
                with jax.named_scope("mlp"):
                    x_BTD = api.residual_mlp(
                        *(x.array, y_BTE, operand(out, dtype, gains[0])),
                        *(operand(up, dtype), operand(down, dtype, gains[1])),
                        activation=cast(api.Activation, self.name),  # served, so no gelu
                        eps=eps,
                        scale=scale,
                        implementation=self.implementation,
                    )
                return x.replaced(x_BTD)
        with jax.named_scope("attention"):
            y_BTD = linear(y_BTE, out, gain=gains[0])
        with jax.named_scope("mlp"):
            u, n_BTD = (x + y_BTD).normed(eps, scale=scale)
            return u + self(n_BTD, gains[1])
