"""The compact GPT: embedding → blocks with U-Net skips → norm → tied, soft-capped head.

x0 = x = norm(E[tokens] + bigrams), blended with the previous position before or after the norm
first half of the blocks:   x = block(x, x0), which is also a skip
recycled core:              x = block(s ⊙ x + b, x0), once more for some of these blocks
second half:                x = block(x + w ⊙ latest unused skip, x0)
logits = softcap(norm(x) Eᵀ)
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init
from sngpt_jax.model.attention import Attention, Positions, make_positions
from sngpt_jax.model.cayley import Taps
from sngpt_jax.model.embeddings import BigramHash, SmearGate, TiedEmbedding, ValueEmbedding
from sngpt_jax.model.layers import rms_norm
from sngpt_jax.model.lazy_stream import start
from sngpt_jax.model.mlp import MLP
from sngpt_jax.model.stream import Stream


class LanguageModel(nnx.Module):
    """`model(tokens_BT)` → float32 logits [B, T, V]; position t sees tokens 0 … t only.

    Each family defines `encode` and `run`.
    """

    # token ids, and the rows' first positions [B] if they are not 0 → what the blocks take
    encode: Callable[..., Any]
    # the result of `encode`, its positions, and those to tap → the head's input and the taps
    run: Callable[..., tuple[jax.Array, Taps | None]]

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = TiedEmbedding(config, rngs=rngs)

    def tapped_hidden(
        self, tokens_BT: jax.Array, *tapped_P: jax.Array
    ) -> tuple[jax.Array, Taps | None]:
        """The result of `run` for whole sequences. Raises ValueError if T exceeds `max_seq_len`."""
        chex.assert_rank(tokens_BT, 2)
        positions = make_positions(self.config, tokens_BT.shape[1])
        with jax.named_scope("embed"):
            encoded = self.encode(tokens_BT)
        return self.run(encoded, positions, *tapped_P)

    def hidden(self, tokens_BT: jax.Array) -> jax.Array:
        """The head's input [B, T, D] for whole sequences."""
        return self.tapped_hidden(tokens_BT)[0]

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.hidden(tokens_BT)
        with jax.named_scope("head"):
            return self.embed.decode(x_BTD)


class Block(nnx.Module):
    """u = a ⊙ x + b ⊙ x0;  u += α ⊙ attention(c norm(u));  u += β ⊙ mlp(c norm(u)).

    The vectors a, b, α, β are learned; α = β = a = 1, b = 0 at the start, unless `resid_mix_init`
    hands over from x0 to x along the depth. c = 1, or 1/√(layer + 1) with `ln_scale` (Sun et al.
    2025, arXiv:2502.05795). Mixing x0 into every block is modded-nanogpt's x0 lambda.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        D = config.d_model
        self.norm_eps = config.norm_eps
        self.norm_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0
        self.attn = Attention(config, layer, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)
        mix = jnp.stack([jnp.ones((D,)), jnp.zeros((D,))])
        if config.resid_mix_init == "phase":
            mix = init.phase_mix(layer, config.num_layers, D)
        self.resid_mix = nnx.Param(mix)
        self.attn_scale = nnx.Param(jnp.ones((D,)))
        self.mlp_scale = nnx.Param(jnp.ones((D,)))

    def __call__(
        self, x: Stream, x0: Stream, positions: Positions, **values: jax.Array | None
    ) -> tuple[Stream, jax.Array]:
        """The block's output and its attention's values; `values` as for `Attention`."""
        keep_D, mix_D = self.resid_mix[...]
        with jax.named_scope("attention"):
            mixed = x.scaled(keep_D) + x0.scaled(mix_D)
            u, n_BTD, *copies = mixed.normed(self.norm_eps, scale=self.norm_scale, uses=3)
            y_BTE, v_BTKh = self.attn.heads(n_BTD, positions, copies=tuple(copies), **values)
        gains, norm = (self.attn_scale[...], self.mlp_scale[...]), (self.norm_eps, self.norm_scale)
        out = self.attn.out[...]
        return self.mlp.residual(u, y_BTE, out, gains, eps=norm[0], scale=norm[1]), v_BTKh


class RecycledCore(nnx.Module):
    """s ⊙ x + b before each repeated application of a block, with s = 1 and b = 0 at the start.

    Source: parameter-golf submission 1573.
    """

    def __init__(self, config: ModelConfig):
        shape = (len(config.recycle_layers), config.d_model)
        self.scale = nnx.Param(jnp.ones(shape))
        self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, application: int, x: Stream) -> Stream:
        return x.scaled(self.scale[...][application]).shifted(self.bias[...][application])


class GPT(LanguageModel):
    """The compact family, with only the parts that `config` asks for."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, i, rngs=rngs) for i in range(config.num_layers)])
        if config.num_skips:
            self.skip_weights = nnx.Param(jnp.ones((config.num_skips, config.d_model)))
        if config.bigram_buckets:
            self.bigram = BigramHash(config, rngs=rngs)
        if config.smear != "none":
            self.smear = SmearGate(config)
        if config.value_embed_layers:
            self.value_embed = ValueEmbedding(config, rngs=rngs)
        if config.recycle_layers:
            self.recycle = RecycledCore(config)

    def encode(
        self, tokens_BT: jax.Array, first_B: jax.Array | None = None
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """The stream x0 [B, T, D], and the embeddings that layers add to their values.

        A position's vectors depend on its token and on the `LOOK_BACK` tokens before it, and on its
        place only within `LOOK_BACK` of the start. Rotary positions enter in the attention.
        """
        del first_B
        config = self.config
        x_BTD = self.embed.encode(tokens_BT)
        if config.bigram_buckets:
            x_BTD += self.bigram(tokens_BT)
        if config.smear == "before_norm":
            x_BTD = self.smear(x_BTD, tokens_BT)
        x_BTD = rms_norm(x_BTD, config.norm_eps)
        if config.smear == "after_norm":
            x_BTD = self.smear(x_BTD, tokens_BT)
        return x_BTD, self.value_embed(tokens_BT) if config.value_embed_layers else {}

    def run(
        self, encoded: tuple[jax.Array, dict[int, jax.Array]], positions: Positions
    ) -> tuple[jax.Array, None]:
        """The head's input [B, T, D]; no code is there to tap."""
        config = self.config
        x0_BTD, added_values = encoded
        x0, first_value = start(x0_BTD, config), None
        x, skips = x0, list[Stream]()
        for i, block in enumerate(self.blocks):
            if i == config.num_skips:
                for application, layer in enumerate(config.recycle_layers):
                    with jax.named_scope(f"recycle_{layer}"):
                        x = self.recycle(application, x)
                        x, _ = self.blocks[layer](x, x0, positions, first_value=first_value)
            if i >= config.num_skips and skips:
                x += skips.pop().scaled(self.skip_weights[...][i - config.num_skips])
            values = {"added_value": added_values.get(i), "first_value": first_value}
            with jax.named_scope(f"block_{i}"):
                x, value = block(x, x0, positions, **values)
            first_value = value if i == 0 else first_value
            if i < config.num_skips:
                x = x.used_twice()
                skips.append(x)
        _, x_BTD = x.normed(config.norm_eps)
        return x_BTD, None
