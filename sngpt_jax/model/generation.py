"""Continues many texts at once: one pass over the prompts, then one token at a time from the kept
keys and values. A text that outgrows the model goes on in windows.

The kept keys and values take 2 · applications · S · K · h numbers per row, S positions of a text.
An application is one use of a block, so a recycled block counts twice. For example, a row of 2,048
tokens takes 19 MB in 9 layers with 4 heads of 64 in bfloat16.

Rows are texts, split over the mesh. The devices exchange nothing until all their rows have ended.
"""

import functools
import math
from collections.abc import Iterator, Sequence
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
from sngpt_jax.model.attention import (
    KeysValues,
    Memory,
    Positions,
    causal_mask,
    ntk_base,
    rotary_tables,
)
from sngpt_jax.model.drawing import draw, row_key
from sngpt_jax.model.embeddings import LOOK_BACK
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, graph
from sngpt_jax.model.gpt import LanguageModel

LEAST_LENGTH = 16  # of rows; compiling for shorter rows would cost more than padding them


def pick(x_BT: jax.Array, at_B: jax.Array) -> jax.Array:
    """One position of each row of x [B, T, ...]: [B, 1, ...]."""
    return jnp.take_along_axis(x_BT, at_B.reshape(-1, *(1,) * (x_BT.ndim - 1)), axis=1)


# ------------------------------------------------------------------------------ on the devices


class _Draws(NamedTuple):
    """How new tokens are drawn, and the token that ends a text."""

    key: jax.Array
    temperature: np.float32
    end_id: np.int32


class _State(NamedTuple):
    """Windows of texts that grow."""

    row_B: jax.Array  # int32, the number of the text
    dropped_B: jax.Array  # int32, tokens of the text before the window
    stop_B: jax.Array  # int32, the position in the window after the last one to fill
    table_B: jax.Array  # int32, index of the row's rotary table
    tokens_BS: jax.Array  # int32
    newest_B: jax.Array  # int32, position of the newest token in the window
    ended_B: jax.Array  # bool, whether the row is complete
    past: list[KeysValues]  # of the tokens before the newest one


class _Programs(NamedTuple):
    """Functions for windows of S positions. `tables` [2, U, S, r/2] are the cosines and sines of U
    rotary bases, None with learned positions.
    """

    # (variables, batch, tables, draws) → the state with one new token per row. A batch holds
    # "tokens" [B, T], the padded windows; "length" [B]; and the first four fields of the state.
    begin: Fitted
    # (variables, state, tables, draws, count) → the state with at most `count` more tokens per row;
    # and of all rows, in every process, the tokens [B, S], the newest position, and the end
    advance: Fitted


@functools.cache
def _programs(
    config: ModelConfig,
    mesh: Mesh,
    size: int,
    top_k: int,
    top_p: float,
    vocab_size: int,
    seq_len: int,
) -> _Programs:
    layout, rows = partition_specs(mesh, abstract_variables(config)), P(BATCH_AXES)

    def appended(
        model: LanguageModel, x_B1D: jax.Array, at_B: jax.Array, state: _State, draws: _Draws
    ) -> _State:
        """Draws the token at each row's `at` from the head's input at the position before. Rows
        that have ended keep their token.
        """
        with jax.named_scope("draw"):
            logits_BV = model.embed.decode(x_B1D)[:, 0]
            keys_B = jax.vmap(row_key, in_axes=(None, 0))(draws.key, state.row_B)
            one = functools.partial(draw, top_k=top_k, top_p=top_p, vocab_size=vocab_size)
            place_B = state.dropped_B + at_B  # in the whole text
            temperature = jnp.asarray(draws.temperature)
            new_B = jax.vmap(one, in_axes=(0, 0, 0, None))(logits_BV, keys_B, place_B, temperature)
        row = jnp.arange(len(new_B))
        new_B = jnp.where(state.ended_B, state.tokens_BS[row, at_B], new_B)
        return state._replace(
            tokens_BS=state.tokens_BS.at[row, at_B].set(new_B),
            newest_B=at_B,
            ended_B=state.ended_B | (new_B == draws.end_id) | (at_B + 1 >= state.stop_B),
        )

    def begin(
        variables: Variables, batch: Batch, tables: jax.Array | None, draws: _Draws
    ) -> _State:
        model = nnx.merge(graph(config), gather(variables, layout))
        tokens_BT, length_B, table_B = batch["tokens"], batch["length"], batch["table"]
        T = tokens_BT.shape[1]
        rotary, memory = None, Memory()
        if tables is not None:
            rotary = (tables[0, table_B, :T], tables[1, table_B, :T])
        x_BTD, _ = model.run(model.encode(tokens_BT), Positions(rotary, causal_mask(T), memory))
        # Behind a shorter prompt's end they are meaningless. A position sees its own key and value
        # only after it has overwritten them.
        padding = [(0, 0), (0, size - T), (0, 0), (0, 0)]
        state = _State(
            batch["row"],
            batch["dropped"],
            batch["stop"],
            table_B,
            tokens_BS=jnp.pad(tokens_BT, [(0, 0), (0, size - T)]),
            newest_B=length_B - 1,
            ended_B=jnp.zeros(len(length_B), bool),
            past=jax.tree.map(lambda x_BTKh: jnp.pad(x_BTKh, padding), memory.kept),
        )
        return appended(model, pick(x_BTD, length_B - 1), length_B, state, draws)

    def advance(
        variables: Variables,
        state: _State,
        tables: jax.Array | None,
        draws: _Draws,
        count: jax.Array,
    ) -> tuple[_State, tuple[jax.Array, ...]]:
        model = nnx.merge(graph(config), gather(variables, layout))

        def unfinished(carry: tuple[jax.Array, _State]) -> jax.Array:
            done, state = carry
            return (done < count) & ~jnp.all(state.ended_B)

        def add_token(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
            """Reads the newest tokens and draws the next ones."""
            done, state = carry
            next_B = state.newest_B + ~state.ended_B
            position_B = next_B - 1
            ahead = jnp.arange(min(LOOK_BACK + 1, size))
            first_B = jnp.maximum(position_B - LOOK_BACK, 0)
            tokens_BW = jnp.take_along_axis(state.tokens_BS, first_B[:, None] + ahead[None], axis=1)
            encoded = jax.tree.map(
                lambda x_BW: pick(x_BW, position_B - first_B), model.encode(tokens_BW, first_B)
            )
            rotary, at = None, (state.table_B, position_B)
            if tables is not None:
                rotary = (tables[0][at][:, None], tables[1][at][:, None])
            seen_B1S = jnp.arange(size)[None, None] <= position_B[:, None, None]
            memory = Memory(state.past, position_B)
            x_B1D, _ = model.run(encoded, Positions(rotary, seen_B1S, memory))
            return done + 1, appended(model, x_B1D, next_B, state._replace(past=memory.kept), draws)

        _, state = jax.lax.while_loop(unfinished, add_token, (jnp.int32(0), state))
        seen = state.tokens_BS, state.newest_B, state.ended_B
        return state, tuple(jax.lax.all_gather(x, BATCH_AXES, tiled=True) for x in seen)

    # check_vma cannot express that each device runs its own number of iterations
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    given = (layout, rows, P(), P())
    first = jax.jit(on_mesh(begin, in_specs=given, out_specs=rows))
    further = on_mesh(advance, in_specs=(*given, P()), out_specs=(rows, P()))
    return _Programs(
        Fitted(first, mesh, "generating", seq_len),
        Fitted(jax.jit(further, donate_argnums=1), mesh, "generating", seq_len),
    )


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


def window(number: int, most: int) -> tuple[int, int]:
    """The window of a text of which token `number` (from 0) is drawn: where it starts, and the
    number of the next token that has another window. A window holds at most `most` ≥ 2 tokens.

    The first window is the text up to `most` tokens. Then every `most` // 2 tokens a new window
    begins with the last `most` // 2 tokens.
    """
    if number < most:
        return 0, most
    half = most // 2
    begun = (number - most) // half  # windows after the second one
    return most + (begun - 1) * half, most + (begun + 1) * half


class Grown(NamedTuple):
    """The continuation of each prompt so far, int32, and whether it is complete."""

    added: list[np.ndarray]
    complete: list[bool]


def grow(
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
    top_p: float = 1.0,
    seed: int = 0,
    first: int = 0,
    at_a_time: int = 0,
) -> Iterator[Grown]:
    """Yields the growing continuations, with at most `at_a_time` + 1 new tokens each (0: as many as
    a window takes), and at last the complete ones: at most `max_tokens` tokens, up to `end_id`.

    A text equals, up to rounding, the result of forward passes over the whole text, whatever other
    prompts run beside it. From `config.max_seq_len` tokens on it is the result of forward passes
    over its `window`. Its draws follow from `seed` < 2^32, its number (`first` + its place in
    `prompts`) and the position. All prompts run at once, so the caller limits their number to what
    the devices hold. Programs are compiled for powers of two of rows per device, length of the
    prompts and total length.

    The `variables` lie over `mesh` as a training step's do. The caller begins each prompt [n ≥ 1]
    with the token that starts a text. With `rope_ntk_len` the rotary base follows from the larger
    of the training's `seq_len` and prompt + `max_tokens`, at most max_seq_len. `vocab_size`,
    `temperature`, `top_k` and `top_p` are those of `draw`. Raises `UserError` for a value out of
    range.
    """
    most = config.max_seq_len
    refusals = {
        "a prompt has no tokens; begin it with the token that starts a document": not all(
            map(len, prompts)
        ),
        f"max_tokens = {max_tokens} must be at least 1": max_tokens < 1,
        f"temperature = {temperature} must be a finite number of at least 0": (
            not 0 <= temperature < math.inf
        ),
        f"top_k = {top_k} must be at least 0; 0 draws from all tokens": top_k < 0,
        f"top_p = {top_p} must be above 0 and at most 1; 1 draws from all tokens": (
            not 0 < top_p <= 1
        ),
        f"model.max_seq_len = {most} leaves no room for a new token": most < 2,
    }
    for message, applies in refusals.items():
        if applies:
            raise UserError(message)
    if not prompts:
        return
    texts = [np.asarray(prompt, np.int32) for prompt in prompts]
    ends = [len(text) + max_tokens for text in texts]
    complete = [False] * len(texts)
    devices, place = mesh.devices.size, batch_placer(mesh)
    rows = devices * next_power_of_two(-(-len(texts) // devices))
    size = _padded(max(ends, default=1), config)
    tables, which = _rotary(config, [min(end, most) for end in ends], seq_len, size)
    top_k = min(top_k, vocab_size)
    begin, advance = _programs(config, mesh, size, top_k, top_p, vocab_size, seq_len)
    draws = _Draws(jax.random.key(seed), np.float32(temperature), np.int32(end_id))

    while not all(complete):
        growing = [i for i, done in enumerate(complete) if not done]
        # the first text fills up the rows, so that these end together with it
        of_row = np.array(growing + growing[:1] * (rows - len(growing)))
        starts, stops = np.transpose([window(len(text), most) for text in texts])
        batch = {
            "row": np.int32(first + of_row),
            "dropped": np.int32(starts[of_row]),
            "stop": np.int32((np.minimum(stops, ends) - starts)[of_row]),
            "table": which[of_row],
        }
        lengths = np.array([len(text) for text in texts], np.int32) - starts
        tokens = np.zeros((rows, _padded(int(lengths[growing].max()), config)), np.int32)
        for filled, i in zip(tokens, of_row, strict=True):
            filled[: lengths[i]] = texts[i][starts[i] :]
        batch |= {"tokens": tokens, "length": np.int32(lengths[of_row])}
        state = begin(variables, place(batch), tables, draws)
        settled = False
        while not settled:
            state, seen = advance(variables, state, tables, draws, np.int32(at_a_time or size))
            tokens, newest, ended = map(np.asarray, seen)
            for row, i in enumerate(growing):
                text = np.concatenate([texts[i][: starts[i]], tokens[row, : newest[row] + 1]])
                closed = text[-1] == end_id
                complete[i] = bool(ended[row]) and (closed or len(text) == ends[i])
                texts[i] = text[:-1] if closed else text
            settled = bool(ended[: len(growing)].all())
            added = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
            yield Grown(added, list(complete))


def generate_tokens(
    config: ModelConfig,
    variables: Variables,
    mesh: Mesh,
    prompts: Sequence[np.ndarray],
    **options: Any,
) -> list[np.ndarray]:
    """The complete continuation of each prompt, int32; the options are those of `grow`."""
    added: list[np.ndarray] = []
    for grown in grow(config, variables, mesh, prompts, **options):
        added = grown.added
    return added


def generate(
    config: ModelConfig,
    variables: Variables,
    mesh: Mesh,
    tokenizer: Tokenizer,
    prompt: str,
    **options: Any,
) -> str:
    """The text of the prompt and its continuation; the options are those of `grow`."""
    ids = start_of(tokenizer, prompt)
    of_tokenizer = {"vocab_size": tokenizer.vocab_size, "end_id": tokenizer.bos_id}
    (new,) = generate_tokens(config, variables, mesh, [ids], **of_tokenizer, **options)
    return tokenizer.decode(np.concatenate([ids[1:], new]))


def start_of(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """The tokens of a document that begins with `prompt`, int32, BOS first."""
    return np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
