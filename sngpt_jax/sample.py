"""Text from a trained model: `python -m sngpt_jax.sample --run runs/quickstart --prompt "def "`."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from sngpt_jax import cli
from sngpt_jax.cli import UserError
from sngpt_jax.config import ModelConfig, Weights
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.model_source import open_model
from sngpt_jax.parallel import make_mesh
from sngpt_jax.step import Params, forward


@functools.partial(jax.jit, static_argnames=("apply", "top_k", "vocab_size"))
def fill(
    apply: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    buffer_T: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_k: int,
    vocab_size: int,
) -> jax.Array:
    """Fills positions start … stop-1 of `buffer_T`, each drawn from the model's distribution given the ones before it.

    Drawn are tokens below `vocab_size`, the tokenizer's: the model's table may have more rows, which no text has trained.
    """

    def draw(position: jax.Array, buffer_T: jax.Array) -> jax.Array:
        logits_V = apply(params, buffer_T[None])[0, position - 1, :vocab_size]
        if top_k:
            threshold = jax.lax.top_k(logits_V, top_k)[0][-1]
            logits_V = jnp.where(logits_V < threshold, -jnp.inf, logits_V)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits_V / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))
        return buffer_T.at[position].set(token.astype(buffer_T.dtype))

    return jax.lax.fori_loop(start, stop, draw, buffer_T)


def generate(
    config: ModelConfig,
    params: Params,
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

    Every position is a full forward pass over one fixed buffer, so one program serves the whole text. `temperature` 0
    takes the likeliest token; `top_k` 0 keeps the whole vocabulary; `seq_len` is the training's. Raises `UserError` where
    the text would not fit into model.max_seq_len positions.
    """
    prompt_ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    length = len(prompt_ids) + max_tokens
    if length > config.max_seq_len:
        raise UserError(
            f"--prompt of {len(prompt_ids)} tokens and --max-tokens {max_tokens} exceed model.max_seq_len ="
            f" {config.max_seq_len}; shorten one of them"
        )
    # with NTK scaling the rotary base follows from the length, and the model knows that of its training
    buffer = np.full(max(length, seq_len) if config.rope_ntk_len else length, tokenizer.bos_id, np.int32)
    buffer[: len(prompt_ids)] = prompt_ids
    filled = fill(
        forward(config),
        params,
        jnp.asarray(buffer),
        jnp.int32(len(prompt_ids)),
        jnp.int32(length),
        jax.random.key(seed),
        jnp.float32(temperature),
        min(top_k, tokenizer.vocab_size),
        tokenizer.vocab_size,
    )
    tokens = np.asarray(filled)[:length]
    ends = np.flatnonzero(tokens[len(prompt_ids) :] == tokenizer.bos_id)
    stop = len(prompt_ids) + ends[0] if len(ends) else length
    return tokenizer.decode(tokens[1:stop])


@dataclass(frozen=True)
class SampleArguments:
    run: Path | None = None  # run directory of a trained model
    artifact: Path | None = None  # or an exported model, *.sngpt
    prompt: str = ""  # text to continue; empty: a new document
    max_tokens: int = 128  # tokens to add
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    seed: int = 0  # of the draws
    step: int | None = None  # checkpoint to load; default: the latest
    weights: Weights | None = None  # of the last step, or an average; default: what the run's eval.weights says
    json: Annotated[str, tyro.conf.arg(metavar="[PATH]")] = ""  # print one JSON object, or write it to PATH


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(
        SampleArguments, args=cli.expand_json(argv), prog="python -m sngpt_jax.sample", description="Generates text."
    )
    if arguments.max_tokens < 1 or not 0 <= arguments.temperature < math.inf or arguments.top_k < 0:
        raise UserError("--max-tokens must be at least 1; --temperature and --top-k must be numbers from 0 up")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} is not between 0 and {2**32 - 1}")
    cli.log_to_stderr()
    model = open_model(arguments.run, arguments.artifact, make_mesh(), arguments.step, arguments.weights)
    tokenizer = model.tokenizer()
    text = generate(
        model.config.model,
        model.variables,
        tokenizer,
        arguments.prompt,
        seq_len=model.config.data.seq_len,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    if arguments.json != "-":
        print(text)
    cli.write_json({"prompt": arguments.prompt, "text": text, "step": model.step, "weights": model.weights}, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
