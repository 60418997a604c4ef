"""The pre-norm GPT: GPT-2 with RMSNorm gains and no biases, optionally with a sparse code in front
of each MLP.

x = E[tokens] (+ P[positions])
blocks:  u = x + attention(g₁ ⊙ norm(x));  x = u + mlp(code(g₂ ⊙ norm(u)))
logits = (g ⊙ norm(x)) Eᵀ
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.attention import Attention, Positions
from sngpt_jax.model.cayley import CayleySAE, Taps
from sngpt_jax.model.embeddings import LearnedPositions
from sngpt_jax.model.gpt import LanguageModel
from sngpt_jax.model.lazy_stream import start
from sngpt_jax.model.mlp import MLP
from sngpt_jax.model.stream import Stream


class PreNormBlock(nnx.Module):
    """One block; it has no code if `levels` is empty."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        self.norm_eps = config.norm_eps
        self.attn_norm = nnx.Param(jnp.ones((config.d_model,)))
        self.attn = Attention(config, layer, rngs=rngs)
        self.mlp_norm = nnx.Param(jnp.ones((config.d_model,)))
        self.coded = bool(config.levels)
        if self.coded:
            self.code = CayleySAE(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Stream, positions: Positions
    ) -> tuple[Stream, tuple[jax.Array, jax.Array] | None]:
        """The block's output, and the code's input [B, T, D] and features [B, T, A]."""
        with jax.named_scope("attention"):
            x, h_BTD, *copies = x.normed(self.norm_eps, gain_D=self.attn_norm[...], uses=3)
            y_BTD, _ = self.attn(h_BTD, positions, copies=tuple(copies))
        u, h_BTD = (x + y_BTD).normed(self.norm_eps, gain_D=self.mlp_norm[...])
        seen = None
        if self.coded:
            with jax.named_scope("code"):
                decoded_BTD, ids_BTA = self.code(h_BTD)
            seen, h_BTD = (h_BTD, ids_BTA), decoded_BTD
        with jax.named_scope("mlp"):
            return u + self.mlp(h_BTD), seen


class PreNormGPT(LanguageModel):
    """The pre-norm family."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        if config.positions == "learned":
            self.positions = LearnedPositions(config, rngs=rngs)
        layers = range(config.num_layers)
        self.blocks = nnx.List([PreNormBlock(config, i, rngs=rngs) for i in layers])
        self.final_norm = nnx.Param(jnp.ones((config.d_model,)))

    def encode(self, tokens_BT: jax.Array, first_B: jax.Array | None = None) -> jax.Array:
        """The stream [B, T, D] for rows that begin at the positions `first_B`, by default 0."""
        x_BTD = self.embed.encode(tokens_BT)
        if self.config.positions == "learned":
            x_BTD = self.positions(x_BTD, first_B)
        return x_BTD

    def run(
        self, encoded: jax.Array, positions: Positions, tapped_P: jax.Array | None = None
    ) -> tuple[jax.Array, Taps | None]:
        """The head's input [B, T, D], and the taps if there are codes and `tapped_P`."""
        x, taps = start(encoded, self.config), []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{i}"):
                x, seen = block(x, positions)
            if seen is not None and tapped_P is not None:
                taps.append([array[:, tapped_P] for array in seen])
        _, x_BTD = x.normed(self.config.norm_eps, gain_D=self.final_norm[...])
        return x_BTD, Taps(*map(jnp.stack, zip(*taps, strict=True))) if taps else None
