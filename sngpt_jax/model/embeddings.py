"""From tokens to vectors: the tied embedding, which is also the output head, learned positions, and
what compact models add.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model import init, loss
from sngpt_jax.model.layers import compute_dtype, linear, per_channel, weighted

# The earlier tokens that a position's vector depends on: smear adds the previous position's bigram.
LOOK_BACK = 2


def look_up(table_Vn: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The rows of a table that `ids` name, [..., n], rounded to `dtype` after the lookup.

    So the table's gradient adds float32 numbers. A sum of equal terms in bfloat16 stops growing
    after 256 of them.
    """
    return table_Vn[ids].astype(dtype)


class LearnedPositions(nnx.Module):
    """One vector per absolute position, added to the stream [B, T, D].

    `first_B` are the rows' first positions, by default 0. Source: Radford et al. 2018 (GPT).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        shape = (config.max_seq_len, config.d_model)
        self.table = nnx.Param(init.normal(rngs.params(), shape, config.embed_init_std))

    def __call__(self, x_BTD: jax.Array, first_B: jax.Array | None = None) -> jax.Array:
        # in float32, as the gradient of a row adds those of all sequences
        table_PD, T = self.table[...], x_BTD.shape[1]
        rows = (
            table_PD[None, :T]
            if first_B is None
            else (table_PD[first_B[:, None] + jnp.arange(T)[None]])
        )
        return (x_BTD.astype(jnp.float32) + rows).astype(x_BTD.dtype)


class TiedEmbedding(nnx.Module):
    """One table [V, D] for vectors and logits. Press & Wolf 2017, arXiv:1608.05859."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = compute_dtype(config)
        self.cap = config.logit_soft_cap
        shape = (config.vocab_size, config.d_model)
        table = init.normal(rngs.params(), shape, config.embed_init_std)
        self.table = nnx.Param(init.overtone(table) if config.embed_init == "overtone" else table)

    def encode(self, tokens_BT: jax.Array) -> jax.Array:
        """Vectors [B, T, D] of token ids, in the compute dtype."""
        return look_up(self.table[...], tokens_BT, self.dtype)

    def decode(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of the result of the model's `hidden`."""
        return loss.logits(x_BTD, self.table[...], self.cap)


def _previous(x: jax.Array) -> jax.Array:
    """`x` [B, T, ...] shifted to the next position, with zeros at the first."""
    return jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))


class SmearGate(nnx.Module):
    """(1 - g) ⊙ x_t + g ⊙ x_{t-1} with g = sigmoid(gate) per channel, which starts at 1/2.

    x_{-1} = 0; with `smear_mask_bos` also before each document. Source: parameter-golf submission
    162; later submissions add the mask.
    """

    def __init__(self, config: ModelConfig):
        self.bos_id = config.bos_id if config.smear_mask_bos else None
        self.gate = nnx.Param(jnp.zeros((config.d_model,)))

    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        g_D = jax.nn.sigmoid(self.gate[...])
        before_BTD = _previous(x_BTD)
        if self.bos_id is not None:
            before_BTD = jnp.where((tokens_BT == self.bos_id)[..., None], 0, before_BTD)
        return per_channel(1.0 - g_D, x_BTD) + per_channel(g_D, before_BTD)


def hash_xor(tokens_BT: jax.Array, buckets: int) -> jax.Array:
    """(36313 x_t) xor (27191 x_{t-1}) in int32, modulo buckets - 1; the first position takes the
    last bucket. int32 [B, T].

    Source: parameter-golf submission 162.
    """
    tokens_BT = tokens_BT.astype(jnp.int32)
    pairs = jnp.bitwise_xor(36313 * tokens_BT[:, 1:], 27191 * tokens_BT[:, :-1]) % (buckets - 1)
    return jnp.concatenate([jnp.full_like(tokens_BT[:, :1], buckets - 1), pairs], axis=1)


def hash_sum(tokens_BT: jax.Array, buckets: int) -> jax.Array:
    """(2654435761 x_t + 40503 x_{t-1}) modulo buckets ≤ 65536, exactly; x_{-1} = 0. int32 [B, T].

    Source: parameter-golf submission 740.
    """
    x, before = (t.astype(jnp.uint32) % buckets for t in (tokens_BT, _previous(tokens_BT)))
    # all factors are below 2^16, so no product exceeds 32 bits
    terms = 2654435761 % buckets * x % buckets + 40503 % buckets * before % buckets
    return (terms % buckets).astype(jnp.int32)


HASHES = {"xor": hash_xor, "sum": hash_sum}


class BigramHash(nnx.Module):
    """scale · table[hash(x_t, x_{t-1})] · proj, [B, T, D].

    Sources: parameter-golf submissions 162 (xor) and 740 (sum, without the scale).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype = compute_dtype(config)
        self.buckets, self.hash = config.bigram_buckets, HASHES[config.bigram_hash]
        shape = (config.bigram_buckets, config.bigram_dim)
        self.table = nnx.Param(init.normal(rngs.params(), shape, config.bigram_init_std))
        shape = (config.bigram_dim, config.d_model)
        self.proj = nnx.Param(init.matrix(config, rngs.params(), shape, config.bigram_proj_gain))
        self.scaled = config.bigram_scale_init > 0
        if self.scaled:
            self.scale = nnx.Param(config.bigram_scale_init * jnp.ones(()))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        rows = look_up(self.table[...], self.hash(tokens_BT, self.buckets), self.dtype)
        x_BTD = linear(rows, self.proj[...])
        return weighted(self.scale[...], x_BTD) if self.scaled else x_BTD


class ValueEmbedding(nnx.Module):
    """{layer: layer_scale · scale · table[x] · proj}, [B, T, K, h], which the layers add to values.

    Source: modded-nanogpt's value embeddings, shared as in parameter-golf submission 1573.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dtype, self.layers = compute_dtype(config), config.value_embed_layers
        self.heads = (config.num_kv_heads, config.head_dim)
        shape = (config.vocab_size, config.value_embed_dim)
        self.table = nnx.Param(init.normal(rngs.params(), shape, 0.01))
        shape = (config.value_embed_dim, config.num_kv_heads * config.head_dim)
        self.proj = nnx.Param(init.matrix(config, rngs.params(), shape))
        self.scale = nnx.Param(0.1 * jnp.ones(()))
        self.layer_scale = nnx.Param(jnp.ones((len(self.layers),)))

    def __call__(self, tokens_BT: jax.Array) -> dict[int, jax.Array]:
        rows = look_up(self.table[...], tokens_BT, self.dtype)
        v_BTKh = linear(rows, self.proj[...]).reshape(*tokens_BT.shape, *self.heads)
        scales = self.scale[...] * self.layer_scale[...]
        return {layer: weighted(scales[i], v_BTKh) for i, layer in enumerate(self.layers)}
