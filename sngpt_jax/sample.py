"""Text from a trained model: `python -m sngpt_jax.sample --run runs/quickstart --prompt "def "`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tyro
from jax.sharding import Mesh

from sngpt_jax import cli
from sngpt_jax.cli import UserError
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.generation import generate_tokens
from sngpt_jax.model_source import open_model
from sngpt_jax.options import Json, OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.parallel import make_mesh
from sngpt_jax.step import Variables


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

    `temperature` 0 takes the likeliest token; `top_k` 0 keeps the whole vocabulary; `seq_len` is the training's. Raises
    `UserError` where the text would not fit into model.max_seq_len positions.
    """
    prompt_ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)]).astype(np.int32)
    if len(prompt_ids) + max_tokens > config.max_seq_len:
        raise UserError(
            f"--prompt of {len(prompt_ids)} tokens and --max-tokens {max_tokens} exceed model.max_seq_len ="
            f" {config.max_seq_len}; shorten one of them"
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


@dataclass(frozen=True)
class SampleArguments:
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # or an exported model, *.sngpt
    prompt: str = ""  # text to continue; empty: a new document
    max_tokens: int = 128  # tokens to add
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from the k likeliest tokens; 0: from all
    seed: int = 0  # of the draws
    step: OptionalInt = None  # checkpoint to load; default: the latest
    weights: WeightsOption = None
    json: Json = ""
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(
        SampleArguments, args=cli.expand_json(argv), prog="python -m sngpt_jax.sample", description="Generates text."
    )
    if arguments.max_tokens < 1 or not 0 <= arguments.temperature < math.inf or arguments.top_k < 0:
        raise UserError("--max-tokens must be at least 1; --temperature and --top-k must be numbers from 0 up")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} is not between 0 and {2**32 - 1}")
    cli.check_json(arguments.json)
    cli.log_to_stderr(arguments.quiet)
    mesh = make_mesh()
    model = open_model(arguments.run, arguments.artifact, mesh, arguments.step, arguments.weights)
    tokenizer = model.tokenizer()
    text = generate(
        model.config.model,
        model.variables,
        mesh,
        tokenizer,
        arguments.prompt,
        seq_len=model.config.data.seq_len,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    if arguments.json != "-":
        print(cli.escape_controls(text))
    cli.write_json({"prompt": arguments.prompt, "text": text, "step": model.step, "weights": model.weights}, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
