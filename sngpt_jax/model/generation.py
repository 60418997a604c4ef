"""Continues many texts at once: one pass over the prompts, then one token at a time from the kept
keys and values.

The kept keys and values take 2 · applications · S · K · h numbers per row, S positions of a text.
An application is one use of a block, so a recycled block counts twice. For example, a row of 2,048
tokens takes 19 MB in 9 layers with 4 heads of 64 in bfloat16.

Rows are texts, split over the mesh. The devices exchange nothing until all their rows have ended.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer, gather, partition_specs
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.model.attention import Memory, Positions, causal_mask, ntk_base, rotary_tables
from sngpt_jax.model.embeddings import LOOK_BACK
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, graph

LEAST_LENGTH = 16  # of rows; compiling for shorter rows would cost more than padding them


def draw(
    logits_V: jax.Array,
    key: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    *,
    top_k: int,
    vocab_size: int,
) -> jax.Array:
    """The token at `position`, int32, drawn from softmax(logits / temperature) of the `top_k`
    likeliest tokens (0: all); `temperature` 0 takes the likeliest.

    Only tokens below `vocab_size`, the tokenizer's, are drawn: further rows of the model's table
    are untrained.
    """
    logits_V = logits_V[:vocab_size]
    if top_k:
        threshold = jax.lax.top_k(logits_V, top_k)[0][-1]
        logits_V = jnp.where(logits_V < threshold, -jnp.inf, logits_V)
    scaled_V = logits_V / jnp.maximum(temperature, 1e-6)
    drawn = jax.random.categorical(jax.random.fold_in(key, position), scaled_V)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)


def row_key(key: jax.Array, row: jax.Array) -> jax.Array:
    """The key of a row's draws: `key` for row 0; other rows fold numbers that no position has."""
    return jnp.where(row == 0, key, jax.random.fold_in(key, jnp.uint32(0) - row.astype(jnp.uint32)))


def pick(x_BT: jax.Array, at_B: jax.Array) -> jax.Array:
    """One position of each row of x [B, T, ...]: [B, 1, ...]."""
    return jnp.take_along_axis(x_BT, at_B.reshape(-1, *(1,) * (x_BT.ndim - 1)), axis=1)


# ------------------------------------------------------------------------------ on the devices


class _Draws(NamedTuple):
    """How new tokens are drawn, and when a text ends."""

    key: jax.Array
    temperature: np.float32
    max_tokens: np.int32
    end_id: np.int32


@functools.cache
def _program(
    config: ModelConfig, mesh: Mesh, size: int, top_k: int, vocab_size: int, seq_len: int
) -> Fitted:
    """The function (variables, batch, tables, draws) → the prompts and their continuations,
    int32 [B, size], replicated over all processes.

    The batch holds "tokens" [B, T], the padded prompts; "length" [B]; "row" [B], the number of each
    text; and "table" [B], the row's index into the rotary `tables` [2, U, size, r/2] of cosines and
    sines, which are None with learned positions.
    """
    layout, rows = partition_specs(mesh, abstract_variables(config)), P(BATCH_AXES)

    def continued(
        variables: Variables, batch: Batch, tables: jax.Array | None, draws: _Draws
    ) -> jax.Array:
        model = nnx.merge(graph(config), gather(variables, layout))
        tokens_BT, length_B, table_B = batch["tokens"], batch["length"], batch["table"]
        T = tokens_BT.shape[1]
        keys_B = jax.vmap(row_key, in_axes=(None, 0))(draws.key, batch["row"])
        draw_rows = jax.vmap(
            functools.partial(draw, top_k=top_k, vocab_size=vocab_size), in_axes=(0, 0, 0, None)
        )

        def append(
            x_B1D: jax.Array, position_B: jax.Array, tokens_BS: jax.Array, ended_B: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """Draws the token at `position_B` from the head's input at the previous position."""
            with jax.named_scope("draw"):
                logits_BV = model.embed.decode(x_B1D)[:, 0]
                new_B = draw_rows(logits_BV, keys_B, position_B, jnp.asarray(draws.temperature))
            tokens_BS = tokens_BS.at[jnp.arange(len(new_B)), position_B].set(new_B)
            return tokens_BS, ended_B | (new_B == draws.end_id)

        def unfinished(carry: tuple[Any, ...]) -> jax.Array:
            count, _, ended_B, _ = carry
            return (count < draws.max_tokens) & ~jnp.all(ended_B)

        def add_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            """Reads the newest token and draws the next one."""
            count, tokens_BS, ended_B, past = carry
            next_B = length_B + count
            position_B = next_B - 1
            window = jnp.arange(min(LOOK_BACK + 1, size))
            first_B = jnp.maximum(position_B - LOOK_BACK, 0)
            tokens_BW = jnp.take_along_axis(tokens_BS, first_B[:, None] + window[None], axis=1)
            encoded = jax.tree.map(
                lambda x_BW: pick(x_BW, position_B - first_B), model.encode(tokens_BW, first_B)
            )
            rotary, at = None, (table_B, position_B)
            if tables is not None:
                rotary = (tables[0][at][:, None], tables[1][at][:, None])
            seen_B1S = jnp.arange(size)[None, None] <= position_B[:, None, None]
            memory = Memory(past, position_B)
            x_B1D, _ = model.run(encoded, Positions(rotary, seen_B1S, memory))
            return count + 1, *append(x_B1D, next_B, tokens_BS, ended_B), memory.kept

        rotary, memory = None, Memory()
        if tables is not None:
            rotary = (tables[0, table_B, :T], tables[1, table_B, :T])
        x_BTD, _ = model.run(model.encode(tokens_BT), Positions(rotary, causal_mask(T), memory))
        # Behind a shorter prompt's end they are meaningless. A position sees its own key and value
        # only after it has overwritten them.
        padding = [(0, 0), (0, size - T), (0, 0), (0, 0)]
        past = jax.tree.map(lambda x_BTKh: jnp.pad(x_BTKh, padding), memory.kept)
        x_B1D = pick(x_BTD, length_B - 1)
        tokens_BS = jnp.pad(tokens_BT, [(0, 0), (0, size - T)])
        begun = append(x_B1D, length_B, tokens_BS, jnp.zeros(len(length_B), bool))
        _, tokens_BS, _, _ = jax.lax.while_loop(unfinished, add_token, (jnp.int32(1), *begun, past))
        return jax.lax.all_gather(tokens_BS, BATCH_AXES, tiled=True)

    # check_vma cannot express that each device runs its own number of iterations
    specs = (layout, rows, P(), P())
    step = jax.jit(
        jax.shard_map(continued, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    )
    return Fitted(step, mesh, "generating", seq_len)


# ------------------------------------------------------------------------------ on the host


def next_power_of_two(number: int) -> int:
    """The smallest power of two ≥ `number` ≥ 1."""
    return 1 << (number - 1).bit_length()


def _padded(length: int, config: ModelConfig) -> int:
    return min(max(LEAST_LENGTH, next_power_of_two(length)), config.max_seq_len)


def _rotary(
    config: ModelConfig, totals: Sequence[int], seq_len: int, size: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """The rotary tables of texts with `totals` tokens each, and the index of each text's table."""
    if config.positions == "learned":
        return None, np.zeros(len(totals), np.int32)
    width = config.rotary_dims
    bases = [
        ntk_base(config.rope_base, width, max(total, seq_len), config.rope_ntk_len)
        for total in totals
    ]
    distinct, which = np.unique(bases, return_inverse=True)
    tables = np.stack([rotary_tables(size, width, base) for base in distinct], axis=1)
    return tables, which.astype(np.int32)


def generate_tokens(
    config: ModelConfig,
    variables: Variables,
    mesh: Mesh,
    prompts: Sequence[np.ndarray],
    *,
    seq_len: int,
    max_tokens: int,
    vocab_size: int,
    end_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[np.ndarray]:
    """The continuation of each prompt, int32: at most `max_tokens` tokens, cut before `end_id`.

    A text equals, up to rounding, the result of forward passes over the whole text, whatever other
    prompts run beside it. Its draws follow from `seed` < 2^32, its place in `prompts` and the
    position. All prompts run at once, so the caller limits their number to what the devices hold.
    Programs are compiled for powers of two of rows per device, prompt length and total length.

    The `variables` lie over `mesh` as a training step's do. The caller begins each prompt [n ≥ 1]
    with the token that starts a text. With `rope_ntk_len` the rotary base follows from the larger
    of the training's `seq_len` and prompt + `max_tokens`. `vocab_size`, `temperature` and `top_k`
    are those of `draw`. Raises `UserError` for a value out of range or a text beyond
    model.max_seq_len.
    """
    if not prompts:
        return []
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    refusals = {
        "a prompt has no tokens; begin it with the token that starts a document": not all(lengths),
        f"max_tokens = {max_tokens} must be at least 1": max_tokens < 1,
        f"temperature = {temperature} must be a finite number of at least 0": (
            not 0 <= temperature < math.inf
        ),
        f"top_k = {top_k} must be at least 0; 0 draws from all tokens": top_k < 0,
        f"a prompt of {longest} tokens and {max_tokens} new ones exceed model.max_seq_len"
        f" = {config.max_seq_len}; shorten one of them": longest + max_tokens > config.max_seq_len,
    }
    for message, applies in refusals.items():
        if applies:
            raise UserError(message)
    size = _padded(longest + max_tokens, config)
    tables, which = _rotary(config, [int(n) + max_tokens for n in lengths], seq_len, size)

    devices = mesh.devices.size
    rows = devices * next_power_of_two(-(-len(prompts) // devices))
    # the first text fills up the rows, so that these end together with it
    row = np.arange(rows, dtype=np.int32) * (np.arange(rows) < len(prompts))
    tokens = np.zeros((len(prompts), _padded(longest, config)), np.int32)
    for prompt_tokens, prompt in zip(tokens, prompts, strict=True):
        prompt_tokens[: len(prompt)] = prompt
    batch = {"tokens": tokens[row], "length": lengths[row], "row": row, "table": which[row]}
    draws = _Draws(
        jax.random.key(seed), np.float32(temperature), np.int32(max_tokens), np.int32(end_id)
    )
    program = _program(config, mesh, size, min(top_k, vocab_size), vocab_size, seq_len)
    texts = program(variables, batch_placer(mesh)(batch), tables, draws)
    added = [text[n : n + max_tokens] for text, n in zip(np.asarray(texts), lengths, strict=False)]
    return [new[: np.argmax(new == end_id)] if end_id in new else new for new in added]


def generate(
    config: ModelConfig,
    variables: Variables,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    seq_len: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> str:
    """The text of the prompt and its continuation; arguments as for `generate_tokens`."""
    prompt_ids = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
    (new,) = generate_tokens(
        config,
        variables,
        mesh,
        [prompt_ids],
        seq_len=seq_len,
        max_tokens=max_tokens,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.bos_id,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    return tokenizer.decode(np.concatenate([prompt_ids[1:], new]))
