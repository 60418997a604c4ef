"""The compact GPT: embedding → blocks with U-Net skips → norm → tied, soft-capped head.

x0 = x = norm(E[tokens])
first half of the blocks:   x = block(x, x0), kept as a skip
second half:                x = block(x + w ⊙ the latest unused skip, x0)
logits = softcap(norm(x) Eᵀ)
"""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.attention import Attention, RotaryTables, rotary_tables
from sngpt_jax.model.embeddings import TiedEmbedding
from sngpt_jax.model.layers import per_channel, rms_norm
from sngpt_jax.model.mlp import MLP


class Block(nnx.Module):
    """u = a ⊙ x + b ⊙ x0;  u += α ⊙ attention(norm(u));  u += β ⊙ mlp(norm(u)), with learned vectors a, b, α, β.

    a = α = β = 1 and b = 0 at the start. The mixing of the embedding into every block is modded-nanogpt's x0 lambda.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.d_model
        self.norm_eps = config.norm_eps
        self.attn = Attention(config, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        self.resid_mix = nnx.Param(jnp.stack([init.ones((D,)), init.zeros((D,))]))
        self.attn_scale = nnx.Param(init.ones((D,)))
        self.mlp_scale = nnx.Param(init.ones((D,)))

    def __call__(self, x_BTD: jax.Array, x0_BTD: jax.Array, rotary: RotaryTables) -> jax.Array:
        keep_D, mix_D = self.resid_mix[...]
        u_BTD = per_channel(keep_D, x_BTD) + per_channel(mix_D, x0_BTD)
        with jax.named_scope("attention"):
            u_BTD += per_channel(self.attn_scale[...], self.attn(rms_norm(u_BTD, self.norm_eps), rotary))
        with jax.named_scope("mlp"):
            u_BTD += per_channel(self.mlp_scale[...], self.mlp(rms_norm(u_BTD, self.norm_eps)))
        return u_BTD


class GPT(nnx.Module):
    """`model(tokens_BT)` → capped float32 logits [B, T, V]; position t sees tokens 0 … t alone."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = TiedEmbedding(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.num_skips = config.num_layers // 2
        if self.num_skips:
            self.skip_weights = nnx.Param(init.ones((self.num_skips, config.d_model)))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        config = self.config
        chex.assert_rank(tokens_BT, 2)
        T = tokens_BT.shape[1]
        if T > config.max_seq_len:
            raise ValueError(f"{T} tokens in a sequence, model.max_seq_len = {config.max_seq_len}")
        rotary = rotary_tables(T, config.head_dim, config.rope_base)
        with jax.named_scope("embed"):
            x_BTD = x0_BTD = rms_norm(self.embed.encode(tokens_BT), config.norm_eps)
        skips: list[jax.Array] = []
        for i, block in enumerate(self.blocks):
            if i >= self.num_skips and skips:
                x_BTD += per_channel(self.skip_weights[...][i - self.num_skips], skips.pop())
            with jax.named_scope(f"block_{i}"):
                x_BTD = block(x_BTD, x0_BTD, rotary)
            if i < self.num_skips:
                skips.append(x_BTD)
        with jax.named_scope("head"):
            return self.embed.decode(rms_norm(x_BTD, config.norm_eps))
