"""Draws of a text's next token from the logits of the model."""

import jax
import jax.numpy as jnp


def filtered(
    logits_V: jax.Array, temperature: jax.Array, *, top_k: int = 0, top_p: float = 1.0
) -> jax.Array:
    """logits / temperature, float32 [V], and -inf for the tokens that are not drawn.

    First only the `top_k` likeliest tokens stay (0: all). Of these only the fewest likeliest stay
    whose probabilities sum to at least `top_p` (nucleus sampling, Holtzman et al. 2020,
    arXiv:1904.09751). The probabilities are those at the `temperature`, of the tokens that `top_k`
    has left. Of equal logits the lower id ranks first.
    """
    scale = jnp.maximum(temperature, 1e-6)
    if not top_k and top_p >= 1:
        return logits_V / scale
    # equal values keep the order of their indices
    ranked, ids = jax.lax.top_k(logits_V, min(top_k or len(logits_V), len(logits_V)))
    kept = jnp.full(len(ids), True)
    if top_p < 1:
        sums = jnp.cumsum(jax.nn.softmax(ranked / scale))
        kept = jnp.concatenate([kept[:1], sums[:-1] < top_p])
    kept_V = jnp.zeros(len(logits_V), bool).at[ids].set(kept, unique_indices=True)
    return jnp.where(kept_V, logits_V / scale, -jnp.inf)


def draw(
    logits_V: jax.Array,
    key: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int,
    top_p: float,
    vocab_size: int,
) -> jax.Array:
    """The token at `position`, int32, drawn from the softmax of `filtered` logits; `temperature` 0
    takes the likeliest.

    Only tokens below `vocab_size`, the tokenizer's, are drawn: further rows of the model's table
    are untrained.
    """
    logits_V = logits_V[:vocab_size]
    kept_V = filtered(logits_V, temperature, top_k=top_k, top_p=top_p)
    drawn = jax.random.categorical(jax.random.fold_in(key, position), kept_V)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)


def row_key(key: jax.Array, row: jax.Array) -> jax.Array:
    """The key of a row's draws: `key` for row 0; other rows fold numbers that no position has."""
    return jnp.where(row == 0, key, jax.random.fold_in(key, jnp.uint32(0) - row.astype(jnp.uint32)))
