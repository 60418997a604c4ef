"""Many texts continued at once: one pass over the prompts, then a token at a time from the keys
and values that were kept.

Full recomputation takes a forward pass over the whole text for every new token. Here that is one
over the prompt, and then for each token the products with one position's vectors and a look at the
kept keys and values. Those take 2 · applications · S · K · h numbers a row, S being prompt and new
tokens rounded up to a power of two and an application each use of a block, so a recycled one
counts twice: 19 MB for a row of 2,048 in 9 layers with 4 heads of 64 in bfloat16.

Rows are texts, split over the mesh. Each device goes its own way until its own rows have ended:
nothing is exchanged before that.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
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
from sngpt_jax.model.embeddings import LOOK_BACK
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, graph

# of the shortest rows that a program is compiled for; below it compiling costs more than padding
LEAST_LENGTH = 16


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
    likeliest tokens; 0: of all.

    `temperature` 0 takes the likeliest. Drawn are tokens below `vocab_size`, the tokenizer's: the
    model's table may have more rows, which no text has trained.
    """
    logits_V = logits_V[:vocab_size]
    if top_k:
        threshold = jax.lax.top_k(logits_V, top_k)[0][-1]
        logits_V = jnp.where(logits_V < threshold, -jnp.inf, logits_V)
    drawn = jax.random.categorical(
        jax.random.fold_in(key, position), logits_V / jnp.maximum(temperature, 1e-6)
    )
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)


def row_key(key: jax.Array, row: jax.Array) -> jax.Array:
    """The key of a row's draws: `key` itself for row 0; another row's is counted from the far end,
    where no position is.
    """
    return jnp.where(row == 0, key, jax.random.fold_in(key, jnp.uint32(0) - row.astype(jnp.uint32)))


def pick(x_BT: jax.Array, at_B: jax.Array) -> jax.Array:
    """Of x [B, T, ...] one position of each row: [B, 1, ...]."""
    return jnp.take_along_axis(x_BT, at_B.reshape(-1, *(1,) * (x_BT.ndim - 1)), axis=1)


# ---------------------------------------------------------------------------------------------- on the devices


@functools.partial(jax.jit, static_argnames=("config", "mesh", "size", "top_k", "vocab_size"))
def _continued(
    variables: Variables,
    batch: Batch,
    tables: jax.Array | None,
    key: jax.Array,
    temperature: jax.Array,
    max_tokens: jax.Array,
    end_id: jax.Array,
    *,
    config: ModelConfig,
    mesh: Mesh,
    size: int,
    top_k: int,
    vocab_size: int,
) -> jax.Array:
    """Prompts and what follows them, int32 [B, size], known to all processes.

    The batch holds "tokens" [B, T], prompts filled up to T; "length" [B], theirs; "row" [B], the
    number of each; and "table" [B], which of the rotary `tables` [cosines and sines, U, size, r/2]
    is a row's; there are none with learned positions. The text of a row goes on, to no purpose,
    while another of its device has not ended.
    """
    layout, rows = partition_specs(mesh, abstract_variables(config)), P(BATCH_AXES)

    def local(
        variables: Variables,
        batch: Batch,
        tables: jax.Array | None,
        key: jax.Array,
        temperature: jax.Array,
        max_tokens: jax.Array,
        end_id: jax.Array,
    ) -> jax.Array:
        model = nnx.merge(graph(config), gather(variables, layout))
        length_B = batch["length"]
        keys_B = jax.vmap(row_key, in_axes=(None, 0))(key, batch["row"])
        draw_rows = jax.vmap(
            functools.partial(draw, top_k=top_k, vocab_size=vocab_size), in_axes=(0, 0, 0, None)
        )

        def append(
            x_B1D: jax.Array, position_B: jax.Array, tokens_BS: jax.Array, ended_B: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            """The texts with the token at `position_B`, drawn from what the head makes of the
            position before.
            """
            with jax.named_scope("draw"):
                new_B = draw_rows(model.embed.decode(x_B1D)[:, 0], keys_B, position_B, temperature)
            return tokens_BS.at[jnp.arange(len(new_B)), position_B].set(new_B), ended_B | (
                new_B == end_id
            )

        def read_prompts(tokens_BT: jax.Array) -> tuple[jax.Array, Sequence[KeysValues]]:
            """What the head multiplies at each prompt's last position, [B, 1, D], and keys and
            values [B, S, K, h].

            Those behind a shorter prompt's end are nothing's; no position sees them before it has
            written its own there.
            """
            T = tokens_BT.shape[1]
            rotary = (
                None
                if tables is None
                else (tables[0, batch["table"], :T], tables[1, batch["table"], :T])
            )
            memory = Memory()
            x_BTD = model.run(model.encode(tokens_BT), Positions(rotary, causal_mask(T), memory))
            filled = [(0, 0), (0, size - T), (0, 0), (0, 0)]
            return pick(x_BTD, length_B - 1), jax.tree.map(
                lambda x_BTKh: jnp.pad(x_BTKh, filled), memory.kept
            )

        def read_token(
            tokens_BS: jax.Array, position_B: jax.Array, past: Sequence[KeysValues]
        ) -> tuple[jax.Array, Sequence[KeysValues]]:
            """The same of the token at `position_B`, given those of the positions before."""
            window = jnp.arange(min(LOOK_BACK + 1, size))
            first_B = jnp.maximum(position_B - LOOK_BACK, 0)
            tokens_BW = jnp.take_along_axis(tokens_BS, first_B[:, None] + window[None], axis=1)
            encoded = jax.tree.map(
                lambda x_BW: pick(x_BW, position_B - first_B), model.encode(tokens_BW, first_B)
            )
            at = batch["table"], position_B
            rotary = None if tables is None else (tables[0][at][:, None], tables[1][at][:, None])
            seen_B1S = jnp.arange(size)[None, None] <= position_B[:, None, None]
            memory = Memory(past, position_B)
            return model.run(encoded, Positions(rotary, seen_B1S, memory)), memory.kept

        x_B1D, past = read_prompts(batch["tokens"])
        tokens_BS = jnp.pad(batch["tokens"], [(0, 0), (0, size - batch["tokens"].shape[1])])
        tokens_BS, ended_B = append(x_B1D, length_B, tokens_BS, jnp.zeros(len(length_B), bool))

        def unfinished(carry: tuple[Any, ...]) -> jax.Array:
            count, _, ended_B, _ = carry
            return (count < max_tokens) & ~jnp.all(ended_B)

        def add_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            count, tokens_BS, ended_B, past = carry
            position_B = length_B + count
            x_B1D, past = read_token(tokens_BS, position_B - 1, past)
            return count + 1, *append(x_B1D, position_B, tokens_BS, ended_B), past

        _, tokens_BS, _, _ = jax.lax.while_loop(
            unfinished, add_token, (jnp.int32(1), tokens_BS, ended_B, past)
        )
        return jax.lax.all_gather(tokens_BS, BATCH_AXES, tiled=True)

    # in the loop the devices part ways, which check_vma knows no word for
    specs = (layout, rows, P(), P(), P(), P(), P())
    program = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return program(variables, batch, tables, key, temperature, max_tokens, end_id)


# ---------------------------------------------------------------------------------------------- on the host


def next_power_of_two(number: int) -> int:
    """The least power of two that is no less than `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def _padded(length: int, config: ModelConfig) -> int:
    return min(max(LEAST_LENGTH, next_power_of_two(length)), config.max_seq_len)


def _rotary(
    config: ModelConfig, totals: Sequence[int], seq_len: int, size: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """The tables of texts with so many tokens each, and which is whose; with NTK scaling the base
    follows from the length.
    """
    if config.positions == "learned":
        return None, np.zeros(len(totals), np.int32)
    width = config.rotary_dims
    bases = [
        ntk_base(config.rope_base, width, max(total, seq_len), config.rope_ntk_len)
        for total in totals
    ]
    distinct, which = np.unique(bases, return_inverse=True)
    return np.stack([rotary_tables(size, width, base) for base in distinct], axis=1), which.astype(
        np.int32
    )


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
    """What follows each prompt, int32: at most `max_tokens` tokens, cut before the first `end_id`.

    A text equals, up to rounding, what forward passes over the whole of it would give, whatever
    other prompts stand beside it; its draws follow from `seed`, its place in `prompts` and the
    position. All prompts run at once: the caller knows how many a device has room for. Programs
    are compiled for numbers of rows a device, prompt lengths and whole lengths that are powers of
    two, lengths from `LEAST_LENGTH` on.

    Args:
      config: the model's.
      variables: laid out over `mesh` as a step's are.
      mesh: the devices, among which the prompts are split.
      prompts: token ids [n], n ≥ 1 of any length each; the tokenizer's first is the caller's to put there.
      seq_len: of the training. With `rope_ntk_len` the rotary base is that of the longer of it and prompt + `max_tokens`.
      max_tokens: the most new tokens of each, at least 1.
      vocab_size: the tokenizer's, of whose tokens alone is drawn.
      end_id: the token that ends a text.
      temperature: of the draws; 0 takes the likeliest token.
      top_k: draw from so many likeliest tokens; 0: from all.
      seed: of the draws, 0 ≤ seed < 2^32.

    Raises:
      UserError: a prompt is empty, `max_tokens` less than 1, or both together more than model.max_seq_len positions;
        `temperature` or `top_k` is negative, or `temperature` not finite.
    """
    if not prompts:
        return []
    lengths = [len(prompt) for prompt in prompts]
    if min(lengths) < 1:
        raise UserError(
            "a prompt without tokens; begin it with one at least, such as that which starts a"
            " document"
        )
    if max_tokens < 1:
        raise UserError(f"max_tokens = {max_tokens}: a text is continued by 1 token or more")
    if not 0 <= temperature < math.inf:
        raise UserError(
            f"temperature = {temperature}: a finite number from 0 up divides the logits"
        )
    if top_k < 0:
        raise UserError(f"top_k = {top_k}: draw from so many tokens, or with 0 from all")
    if max(lengths) + max_tokens > config.max_seq_len:
        raise UserError(
            f"a prompt of {max(lengths)} tokens and {max_tokens} new ones exceed model.max_seq_len"
            f" = {config.max_seq_len}; shorten one of them"
        )
    size = _padded(max(lengths) + max_tokens, config)
    tables, which = _rotary(config, [length + max_tokens for length in lengths], seq_len, size)

    devices = mesh.devices.size
    rows = devices * next_power_of_two(-(-len(prompts) // devices))
    # those that fill up are the first again, and end with it
    row = np.arange(rows) * (np.arange(rows) < len(prompts))
    tokens = np.zeros((len(prompts), _padded(max(lengths), config)), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : lengths[i]] = prompt
    batch = {
        "tokens": tokens,
        "length": np.asarray(lengths, np.int32),
        "row": np.arange(len(prompts), dtype=np.int32),
    }
    batch = {name: array[row] for name, array in {**batch, "table": which}.items()}
    texts = _continued(
        variables,
        batch_placer(mesh)(batch),
        tables,
        jax.random.key(seed),
        np.float32(temperature),
        np.int32(max_tokens),
        np.int32(end_id),
        config=config,
        mesh=mesh,
        size=size,
        top_k=min(top_k, vocab_size),
        vocab_size=vocab_size,
    )
    added = [
        text[length : length + max_tokens]
        for text, length in zip(np.asarray(texts), lengths, strict=False)
    ]
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
    """The prompt continued by `max_tokens` tokens, cut at the next document's start.

    `temperature` 0 takes the likeliest token; `top_k` 0 keeps the whole vocabulary; `seq_len` is
    the training's. Raises `UserError` where the text would not fit into model.max_seq_len
    positions.
    """
    prompt_ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    if len(prompt_ids) + max_tokens > config.max_seq_len:
        raise UserError(
            f"--prompt of {len(prompt_ids)} tokens and --max-tokens {max_tokens} exceed"
            f" model.max_seq_len = {config.max_seq_len}; shorten one of them"
        )
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
