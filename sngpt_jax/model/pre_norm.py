"""The pre-norm GPT: GPT-2 with RMSNorm gains and no biases, optionally with a sparse code in front
of each MLP.

x = E[tokens] (+ P[positions])
blocks:  u = x + attention(g₁ ⊙ norm(x));  x = u + mlp(code(g₂ ⊙ norm(u)))
logits = (g ⊙ norm(x)) Eᵀ
"""

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.attention import Attention, Positions, make_positions
from sngpt_jax.model.cayley import CayleySAE, Taps
from sngpt_jax.model.embeddings import LearnedPositions, TiedEmbedding
from sngpt_jax.model.layers import per_channel, rms_norm
from sngpt_jax.model.mlp import MLP


class PreNormBlock(nnx.Module):
    """u = x + attention(g₁ ⊙ norm(x));  u + mlp(code(g₂ ⊙ norm(u))); no code if `levels`
    is empty.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        self.norm_eps = config.norm_eps
        self.attn_norm = nnx.Param(init.ones((config.d_model,)))
        self.attn = Attention(config, layer, rngs=rngs)
        self.mlp_norm = nnx.Param(init.ones((config.d_model,)))
        self.coded = bool(config.levels)
        if self.coded:
            self.code = CayleySAE(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, positions: Positions
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """The block's output [B, T, D], and the code's input [B, T, D] and features [B, T, A]."""

        def normed(u_BTD: jax.Array, gain: nnx.Param[jax.Array]) -> jax.Array:
            return per_channel(gain[...], rms_norm(u_BTD, self.norm_eps))

        with jax.named_scope("attention"):
            y_BTD, _ = self.attn(normed(x_BTD, self.attn_norm), positions)
            u_BTD = x_BTD + y_BTD
        h_BTD = normed(u_BTD, self.mlp_norm)
        seen = None
        if self.coded:
            with jax.named_scope("code"):
                decoded_BTD, ids_BTA = self.code(h_BTD)
            seen, h_BTD = (h_BTD, ids_BTA), decoded_BTD
        with jax.named_scope("mlp"):
            return u_BTD + self.mlp(h_BTD), seen


class PreNormGPT(nnx.Module):
    """`model(tokens_BT)` → float32 logits [B, T, V]; position t sees tokens 0 … t only."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = TiedEmbedding(config, rngs=rngs)
        if config.positions == "learned":
            self.positions = LearnedPositions(config, rngs=rngs)
        self.blocks = nnx.List(
            [PreNormBlock(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.final_norm = nnx.Param(init.ones((config.d_model,)))

    def encode(self, tokens_BT: jax.Array, first_B: jax.Array | None = None) -> jax.Array:
        """The stream [B, T, D] for rows that begin at the positions `first_B`, by default 0."""
        x_BTD = self.embed.encode(tokens_BT)
        if self.config.positions == "learned":
            x_BTD += self.positions(tokens_BT.shape[1], first_B)
        return x_BTD

    def tapped_hidden(
        self, tokens_BT: jax.Array, tapped_P: jax.Array
    ) -> tuple[jax.Array, Taps | None]:
        """The head's input [B, T, D], and the codes' inputs and features at the positions
        `tapped_P`.

        Raises ValueError if T exceeds `max_seq_len`.
        """
        chex.assert_rank(tokens_BT, 2)
        positions = make_positions(self.config, tokens_BT.shape[1])
        with jax.named_scope("embed"):
            x_BTD = self.encode(tokens_BT)
        return self.tapped_run(x_BTD, positions, tapped_P)

    def tapped_run(
        self, x_BTD: jax.Array, positions: Positions, tapped_P: jax.Array
    ) -> tuple[jax.Array, Taps | None]:
        """As `tapped_hidden`, from the result of `encode` at these positions."""
        taps: list[tuple[jax.Array, ...]] = []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"block_{i}"):
                x_BTD, seen = block(x_BTD, positions)
            if seen is not None:
                taps.append(tuple(array[:, tapped_P] for array in seen))
        x_BTD = per_channel(self.final_norm[...], rms_norm(x_BTD, self.config.norm_eps))
        return x_BTD, Taps(*map(jnp.stack, zip(*taps, strict=True))) if taps else None

    def hidden(self, tokens_BT: jax.Array) -> jax.Array:
        """The head's input [B, T, D] for whole sequences."""
        return self.tapped_hidden(tokens_BT, jnp.arange(0))[0]

    def run(self, x_BTD: jax.Array, positions: Positions) -> jax.Array:
        """The head's input [B, T, D], from the result of `encode` at these positions."""
        return self.tapped_run(x_BTD, positions, jnp.arange(0))[0]

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.hidden(tokens_BT)
        with jax.named_scope("head"):
            return self.embed.decode(x_BTD)
