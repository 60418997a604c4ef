"""Scores a trained model on validation text: `python -m sngpt_jax.evaluate --run runs/quickstart`."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from sngpt_jax import cli
from sngpt_jax.checks import validate
from sngpt_jax.cli import UserError
from sngpt_jax.config import ExportConfig, Weights
from sngpt_jax.console import progress_reporter
from sngpt_jax.evaluation.bpb import score_stream
from sngpt_jax.optim.qat import has_grid, on_grid
from sngpt_jax.parallel import make_mesh
from sngpt_jax.recipe import peek
from sngpt_jax.run_directory import load_model, open_data, read_config
from sngpt_jax.step import make_eval_step


@dataclass(frozen=True)
class EvaluateArguments:
    run: Path  # run directory of a trained model
    data: Path | None = None  # folder with prepared validation shards; default: the run's
    step: int | None = None  # checkpoint to score; default: the latest
    weights: Weights | None = None  # of the last step, or an average; default: what the run's eval.weights says
    fake_quantize: bool = False  # put the matrices on the export grid first; tables stay as they are
    export: ExportConfig = field(default_factory=ExportConfig)  # that grid; default: the run's
    tokens: int = 0  # score so many tokens from the start of the stream; 0: all
    json: Annotated[str, tyro.conf.arg(metavar="[PATH]")] = ""  # print one JSON object, or write it to PATH


def main(argv: Sequence[str]) -> int:
    run = peek(argv, "--run")
    missing: Any = tyro.MISSING
    default = EvaluateArguments(Path(run), export=read_config(Path(run)).export) if run else EvaluateArguments(missing)
    arguments = tyro.cli(
        EvaluateArguments,
        args=cli.expand_json(argv),
        default=default,
        prog="python -m sngpt_jax.evaluate",
        description="Scores a trained model: loss in nats a token and bits a byte, in standard windows.",
    )
    if arguments.tokens < 0:
        raise UserError(f"--tokens {arguments.tokens} is negative; 0 scores all of the stream")
    cli.log_to_stderr()
    mesh = make_mesh()
    model = load_model(arguments.run, mesh, arguments.step, arguments.weights)
    config = validate(replace(model.config, export=arguments.export))
    if arguments.fake_quantize and not has_grid(config.export):
        raise UserError("--fake-quantize has no grid: export.mlp_bits, attention_bits and projection_bits are all 16")
    if config.export != model.config.export and not arguments.fake_quantize:
        raise UserError("--export options change nothing without --fake-quantize")
    variables = on_grid(model.variables, config.export) if arguments.fake_quantize else model.variables
    dataset = open_data(arguments.run, arguments.data or Path(config.data.dir), config.model.vocab_size)

    start = time.perf_counter()
    score = score_stream(
        variables,
        make_eval_step(config.model, mesh),
        dataset.val,
        dataset.tokenizer.token_bytes(),
        mesh,
        seq_len=config.data.seq_len,
        device_batch_tokens=config.eval.device_batch_tokens,
        max_tokens=arguments.tokens,
        progress=progress_reporter("evaluate"),
    )
    if not math.isfinite(score.loss):
        raise UserError(f"{arguments.run}: the loss of step {model.step} is {score.loss}; take an earlier --step")
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
        which = f"{model.weights} weights" + (" on the export grid" if arguments.fake_quantize else "")
        print(
            f"step {model.step}, {which}: loss {score.loss:.4f} nats/token, {score.bpb:.4f} bits/byte"
            f" over {score.tokens:,} tokens = {score.bytes:,} bytes ({seconds:.1f} s)"
        )
    cli.write_json(result, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
