"""Text from a trained model: `python -m sngpt_jax.sample --run runs/quickstart --prompt "def "`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.config.options import (
    Json,
    KernelsOption,
    OptionalInt,
    OptionalPath,
    Quiet,
    WeightsOption,
)


@dataclass(frozen=True)
class SampleArguments:
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # exported model, *.sngpt, instead of --run
    prompt: str = ""  # text to continue; empty: begin a new document
    max_tokens: int = 128  # number of tokens to generate at most
    temperature: float = 0.8  # divides the logits; 0: always take the most probable token
    top_k: int = 0  # draw from this many of the most probable tokens; 0: from all
    seed: int = 0  # seed of the random draws
    step: OptionalInt = None  # checkpoint to load; default: the latest
    weights: WeightsOption = None
    kernels: KernelsOption = "check"
    json: Json = ""
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(
        SampleArguments,
        args=cli.expand_json(argv),
        prog="python -m sngpt_jax.sample",
        description="Generates text.",
    )
    if arguments.max_tokens < 1 or not 0 <= arguments.temperature < math.inf or arguments.top_k < 0:
        raise UserError("--max-tokens must be 1 or more, --temperature and --top-k 0 or more")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} is not between 0 and {2**32 - 1}")
    cli.check_json(arguments.json)
    cli.log_to_stderr(arguments.quiet)
    from sngpt_jax.cluster.mesh import make_mesh  # imports jax
    from sngpt_jax.model import generation
    from sngpt_jax.weights.source import open_model

    mesh = make_mesh()
    model = open_model(
        arguments.run,
        arguments.artifact,
        mesh,
        arguments.step,
        arguments.weights,
        arguments.kernels,
    )
    config, prompt = model.config, arguments.prompt
    text = generation.generate(
        config.model,
        model.variables,
        mesh,
        model.tokenizer(),
        prompt,
        seq_len=config.data.seq_len,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    if arguments.json != "-":
        print(cli.escape_controls(text))
    found = {"prompt": prompt, "text": text, "step": model.step, "weights": model.weights}
    cli.write_json(found, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
