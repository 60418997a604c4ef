"""Scores a trained model on validation text: `python -m sngpt_jax.evaluate --run runs/quickstart`, or `--artifact F`."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from sngpt_jax import cli
from sngpt_jax.checks import validate
from sngpt_jax.cli import UserError
from sngpt_jax.config import ExportConfig, Weights
from sngpt_jax.console import progress_reporter
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.model_source import open_model
from sngpt_jax.parallel import make_mesh
from sngpt_jax.quantized_model import quantize_variables
from sngpt_jax.recipe import peek
from sngpt_jax.run_directory import read_config


@dataclass(frozen=True)
class EvaluateArguments:
    run: Path | None = None  # run directory of a trained model
    artifact: Path | None = None  # or an exported model, *.sngpt
    data: Path | None = None  # folder with prepared validation shards; default: the run's
    step: int | None = None  # checkpoint to score; default: the latest
    weights: Weights | None = None  # of the last step, or an average; default: what the run's eval.weights says
    fake_quantize: bool = False  # score what `export` would write, without writing it
    export: Annotated[ExportConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=ExportConfig
    )  # how it would; default: the run's
    tokens: int = 0  # score so many tokens from the start of the stream; 0: all
    json: Annotated[str, tyro.conf.arg(metavar="[PATH]")] = ""  # print one JSON object, or write it to PATH


def main(argv: Sequence[str]) -> int:
    run = peek(argv, "--run")
    default = EvaluateArguments(export=read_config(Path(run)).export) if run else EvaluateArguments()
    arguments = tyro.cli(
        EvaluateArguments,
        args=cli.expand_json(argv),
        default=default,
        prog="python -m sngpt_jax.evaluate",
        description="Scores a trained model: loss in nats a token and bits a byte, in standard windows.",
    )
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens} is negative; 0 scores all of the stream")
    if arguments.fake_quantize and arguments.artifact:
        raise UserError("--fake-quantize is for a --run; an artifact is quantized")
    if arguments.export != default.export and not arguments.fake_quantize:
        raise UserError("--export options change nothing without --fake-quantize")
    cli.log_to_stderr()
    mesh = make_mesh()
    model = open_model(arguments.run, arguments.artifact, mesh, arguments.step, arguments.weights)
    config = validate(replace(model.config, export=arguments.export)) if arguments.run else model.config
    dataset = model.open_data(arguments.data)
    variables = (
        quantize_variables(model.variables, config, dataset, mesh, progress_reporter("calibrate"))
        if arguments.fake_quantize
        else model.variables
    )

    start = time.perf_counter()
    score = score_validation(config, variables, dataset, mesh, arguments.tokens, progress_reporter("evaluate"))
    if not math.isfinite(score.loss):
        remedy = "export other weights" if arguments.artifact else "take an earlier --step"
        raise UserError(f"{model.source}: the loss of step {model.step} is {score.loss}; {remedy}")
    seconds = time.perf_counter() - start
    result = {
        **score.as_dict(),
        "bytes_per_token": score.bytes / score.tokens,
        "windows": score.tokens // config.data.seq_len,
        "seconds": seconds,
        "tok_per_s": score.tokens / seconds,
        "step": model.step,
        "weights": model.weights,
        "fake_quantized": arguments.fake_quantize,
    }
    if arguments.json != "-":
        which = f"{model.weights} weights" + (" as export would keep them" if arguments.fake_quantize else "")
        print(
            f"step {model.step}, {which}: loss {score.loss:.4f} nats/token, {score.bpb:.4f} bits/byte"
            f" over {score.tokens:,} tokens = {score.bytes:,} bytes ({seconds:.1f} s)"
        )
    cli.write_json(result, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
