"""The token embedding, which is also the output head."""

import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.layers import compute_dtype, soft_cap


class TiedEmbedding(nnx.Module):
    """One table [V, D] that turns tokens into vectors and vectors into logits. Press & Wolf 2017, arXiv:1608.05859."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = compute_dtype(config)
        self.cap = config.logit_soft_cap
        self.table = nnx.Param(init.normal(rngs.params(), (config.vocab_size, config.d_model), config.embed_init_std))

    def encode(self, tokens_BT: jax.Array) -> jax.Array:
        """Vectors [B, T, D] of token ids, in the compute dtype."""
        return self.table[...].astype(self.dtype)[tokens_BT]

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """Soft-capped logits [B, T, V]; the product accumulates in float32 and is never rounded below it."""
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, self.table[...].astype(self.dtype), preferred_element_type=jnp.float32)
        return soft_cap(logits_BTV, self.cap)
