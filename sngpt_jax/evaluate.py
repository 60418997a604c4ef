"""Scores a trained model: `python -m sngpt_jax.evaluate --run runs/quickstart`, or `--artifact F`.

In bits a byte over validation text, in standard or sliding windows and with n-gram caches; and in
downstream tasks.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.sharding import Mesh

from sngpt_jax import __version__
from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.config import Config, ExportConfig
from sngpt_jax.config.checks import validate
from sngpt_jax.config.options import Json, OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.config.recipe import peek
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation import tasks
from sngpt_jax.evaluation.bpb import score_stream
from sngpt_jax.evaluation.likelihood import LanguageModel
from sngpt_jax.evaluation.ngram import score as ngram_score
from sngpt_jax.evaluation.ngram.cache import Cache, make_cache
from sngpt_jax.evaluation.ngram.chunk import in_bytes
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import (
    Tail,
    Windows,
    rows_at_a_time,
    sliding_windows,
    standard_windows,
    window_batches,
)
from sngpt_jax.model.forward import Variables
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.run.directory import read_config
from sngpt_jax.weights.quantized_model import quantize_variables
from sngpt_jax.weights.source import open_model

logger = logging.getLogger("sngpt_jax")

STRIDE = 64
MOST_MEMORY = 2**16  # GiB


@dataclass(frozen=True)
class EvaluateArguments:
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # or an exported model, *.sngpt
    data: OptionalPath = None  # folder with prepared validation shards; default: the run's
    step: OptionalInt = None  # checkpoint to score; default: the latest
    weights: WeightsOption = None
    fake_quantize: bool = False  # score what `export` would write, without writing it
    export: Annotated[ExportConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=ExportConfig
    )  # how it would; default: the run's
    # windows side by side, or overlapping; none: only --tasks
    mode: Literal["standard", "sliding", "none"] = "standard"
    # targets by which sliding windows advance; default: 64, or a whole window where that is less
    stride: OptionalInt = None
    # of sliding windows: every target once; published: the last ones again and again, as submitted
    tail: Tail = "full"
    tokens: int = 0  # score so many tokens from the start of the stream; 0: all
    # cache of what has been scored, beside the model
    ngram: Literal["none", "hashed5", "backoff", "exact", "tilt"] = "none"
    # backoff counts as published: no lower orders where a higher one was mixed in
    ngram_undercount: bool = False
    ngram_memory: float = 4.0  # GiB that exact may take for its counts
    # downstream tasks: hellaswag=PATH,lambada=PATH,squad=PATH, or names of lm-eval's
    tasks: str = ""
    task_limit: int = 0  # the first so many samples of each task; 0: all
    task_definitions: OptionalPath = None  # folder with more task definitions for lm-eval, YAML
    json: Json = ""
    quiet: Quiet = False
    processes: Annotated[ProcessArguments, tyro.conf.arg(name="")] = field(
        default_factory=ProcessArguments
    )


def check(arguments: EvaluateArguments, default: EvaluateArguments) -> None:
    """Raises `UserError` for options that cannot be, or that would change nothing."""
    if arguments.tokens < 0 or arguments.task_limit < 0:
        raise UserError("--tokens and --task-limit cannot be negative; 0 takes all")
    if arguments.fake_quantize and arguments.artifact:
        raise UserError("--fake-quantize is for a --run; an artifact is quantized")
    if arguments.export != default.export and not arguments.fake_quantize:
        raise UserError("--export options change nothing without --fake-quantize")
    if arguments.mode != "sliding" and (arguments.stride is not None or arguments.tail != "full"):
        raise UserError("--stride and --tail are of sliding windows; add --mode sliding")
    if arguments.mode == "none" and not arguments.tasks:
        raise UserError("--mode none scores no stream; name --tasks, or leave it out")
    if arguments.mode == "none" and (arguments.ngram != "none" or arguments.tokens):
        raise UserError("--ngram and --tokens are of a stream; leave --mode none out")
    if arguments.ngram != "none" and arguments.tail == "published":
        raise UserError(
            "--ngram counts each target once, and --tail published scores some again; leave one of"
            " them out"
        )
    if arguments.ngram_undercount and arguments.ngram != "backoff":
        raise UserError("--ngram-undercount is of --ngram backoff")
    if arguments.ngram_memory != default.ngram_memory and arguments.ngram != "exact":
        raise UserError("--ngram-memory is of --ngram exact")
    if not 0 < arguments.ngram_memory <= MOST_MEMORY:
        raise UserError(
            f"--ngram-memory {arguments.ngram_memory} is not a number of GiB above 0 and up to"
            f" {MOST_MEMORY:,}"
        )
    if not arguments.tasks and (arguments.task_limit or arguments.task_definitions):
        raise UserError("--task-limit and --task-definitions are of --tasks")
    cli.check_json(arguments.json)


def windows_of(arguments: EvaluateArguments, num_tokens: int, seq_len: int) -> Windows:
    """The windows that are asked for, of a stream of `num_tokens`."""
    if arguments.mode == "standard":
        return standard_windows(num_tokens, seq_len, arguments.tokens)
    stride = min(STRIDE, seq_len) if arguments.stride is None else arguments.stride
    return sliding_windows(num_tokens, seq_len, stride, arguments.tokens, arguments.tail)


def score(
    arguments: EvaluateArguments, config: Config, variables: Variables, dataset: Dataset, mesh: Mesh
) -> dict[str, Any]:
    """The score of the validation stream and how long it took: from tokens to losses, without
    compiling and a cache's mass.
    """
    stream, token_bytes, device_batch_tokens = (
        dataset.val,
        dataset.tokenizer.token_bytes(),
        config.eval.device_batch_tokens,
    )
    windows = windows_of(arguments, len(stream), config.data.seq_len)

    def new_cache() -> Cache:
        assert arguments.ngram != "none"
        return make_cache(
            arguments.ngram,
            first_token=int(stream.take(0, 1)[0]),
            vocab_size=config.model.vocab_size,
            targets=windows.targets,
            first_segment=windows.seq_len,
            segment=windows.stride,
            memory=int(arguments.ngram_memory * 2**30),
            undercount=arguments.ngram_undercount,
        )

    cache = new_cache() if arguments.ngram != "none" else None
    if cache:
        kept = in_bytes(ngram_score.memory_of_chunks(cache, windows.targets))
        logger.info(
            "n-gram cache %s: %s; %s of the model's readings are kept for the mass",
            arguments.ngram,
            cache.about,
            kept,
        )
        ngram_score.warm_up(cache)
    eval_step = make_eval_step(
        config.model, mesh, ngram_score.readings_for(cache) if cache else ("nll",)
    )
    first = next(
        window_batches(
            stream, windows, rows_at_a_time(windows, device_batch_tokens, mesh.devices.size)
        )
    ).arrays
    if cache and cache.hints:
        first["hints"] = first["targets"].astype(np.int32)
    compiled = eval_step.lower(variables, batch_placer(mesh)(first)).compile()
    progress = progress_reporter("evaluate")

    start = time.perf_counter()
    given = (variables, compiled, stream, token_bytes, mesh, windows)
    if cache:
        cached = ngram_score.score_with_cache(
            *given, cache, device_batch_tokens=device_batch_tokens, progress=progress
        )
        found = cached.model
    else:
        found = score_stream(*given, device_batch_tokens=device_batch_tokens, progress=progress)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        **found.as_dict(),
        "bytes_per_token": found.bytes / found.tokens,
        "mode": arguments.mode,
        "stride": windows.stride,
        "windows": windows.count,
        "seconds": seconds,
        "tok_per_s": found.tokens / seconds,
        "forward_tok_per_s": windows.num_rows * windows.seq_len / seconds,
    }
    if cache:
        del cache  # or there were two at a time
        fresh = new_cache()
        mass = ngram_score.mass(fresh, cached.chunks, progress_reporter("mass"))
        result["ngram"] = {
            "cache": arguments.ngram,
            **ngram_score.as_dict(cached.score, mass, fresh),
        }
    return result


def describe(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The score for a person."""
    which = f"{result['windows']:,} windows" + (
        f", stride {result['stride']}" if result["mode"] == "sliding" else ""
    )
    rows = [
        ("score", f"loss {result['loss']:.4f} nats/token, {result['bpb']:.4f} bits/byte"),
        (
            "over",
            (
                f"{result['tokens']:,} tokens = {result['bytes']:,} bytes in {which};"
                f" {result['seconds']:.1f} s"
            ),
        ),
    ]
    if cached := result.get("ngram"):
        mass = cached["mass"]
        verdict = "" if cached["is_distribution"] else ": not a probability distribution"
        rows.append(
            (
                f"with {cached['cache']}",
                (
                    f"loss {cached['loss']:.4f} nats/token, {cached['bpb']:.4f} bits/byte; mass of"
                    f" the vocabulary {mass['mean']:.6g}, from {mass['min']:.6g} to"
                    f" {mass['max']:.6g}, at {mass['positions']:,} positions{verdict};"
                    f" {cached['normalized_bpb']:.4f} bits/byte if divided by it"
                ),
            )
        )
    return rows


def readable(value: Any) -> str:
    """A task's number to five digits; anything else as it is."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def main(argv: Sequence[str]) -> int:
    run = peek(argv, "--run")
    default = (
        EvaluateArguments(export=read_config(Path(run)).export) if run else EvaluateArguments()
    )
    arguments = tyro.cli(
        EvaluateArguments,
        args=cli.expand_json(argv),
        default=default,
        prog="python -m sngpt_jax.evaluate",
        description=(
            "Scores a trained model: loss in nats a token and bits a byte, and downstream tasks."
        ),
    )
    check(arguments, default)
    spec = tasks.parse_tasks(arguments.tasks, arguments.task_definitions) if arguments.tasks else {}
    cli.log_to_stderr(arguments.quiet)
    with processes.joined(arguments.processes):
        return evaluate(arguments, spec)


def following(arguments: EvaluateArguments) -> list[str]:
    """The commands that a person may type next."""
    if not arguments.run:
        return []
    run, chosen = (
        str(arguments.run),
        (["--step", str(arguments.step)] if arguments.step is not None else []),
    )
    chosen += ["--weights", arguments.weights] if arguments.weights else []
    return [cli.command("sngpt_jax.export", "--run", run, *chosen, "--out", f"{run}/model.sngpt")]


def evaluate(arguments: EvaluateArguments, spec: dict[str, Path | None]) -> int:
    """Scores what `arguments` name, and prints or writes the result."""
    options = {
        name: repr(value)
        for name, value in vars(arguments).items()
        if name not in ("processes", "json", "quiet")
    }
    processes.check_alike({"version": f"{__version__}, jax {jax.__version__}"} | options)
    mesh = make_mesh()
    model = open_model(arguments.run, arguments.artifact, mesh, arguments.step, arguments.weights)
    config = (
        validate(replace(model.config, export=arguments.export)) if arguments.run else model.config
    )
    dataset = (
        model.open_data(arguments.data)
        if arguments.mode != "none" or arguments.fake_quantize
        else None
    )
    if dataset:
        processes.check_alike(
            {"validation tokens": len(dataset.val), "tokenizer": dataset.tokenizer.sha256}
        )
    variables = model.variables
    if arguments.fake_quantize:
        assert dataset
        variables = quantize_variables(
            variables, config, dataset, mesh, progress_reporter("calibrate")
        )

    asked = None
    if spec:
        tokenizer = model.tokenizer() if model.tokenizer_path or not dataset else dataset.tokenizer
        asked = LanguageModel(config, variables, tokenizer, mesh)

    result: dict[str, Any] = {
        "step": model.step,
        "weights": model.weights,
        "fake_quantized": arguments.fake_quantize,
    }
    kept = " as export would keep them" if arguments.fake_quantize else ""
    rows = [("model", f"{model.source}, step {model.step}, {model.weights} weights{kept}")]
    if arguments.mode != "none":
        assert dataset
        result = score(arguments, config, variables, dataset, mesh) | result
        if not math.isfinite(result["loss"]):
            remedy = "export other weights" if arguments.artifact else "take an earlier --step"
            raise UserError(
                f"{model.source}: the loss of step {model.step} is {result['loss']}; {remedy}"
            )
        rows += describe(result)
        if asked and processes.index() == 0:
            logger.info("%s; the tasks follow", rows[1][1])
    failed = []
    if asked:
        result["tasks"] = tasks.run_tasks(
            asked,
            spec,
            limit=arguments.task_limit,
            include=arguments.task_definitions,
            progress=progress_reporter,
        )
        for name, metrics in result["tasks"].items():
            rows.append(
                (
                    name,
                    ", ".join(f"{metric} {readable(value)}" for metric, value in metrics.items()),
                )
            )
        failed = [
            f"{name}: {metrics['error']}"
            for name, metrics in result["tasks"].items()
            if "error" in metrics
        ]
    if processes.index() == 0:
        if arguments.json != "-":
            terminal.show_result("evaluated", rows, [] if failed else following(arguments))
        cli.write_json(result, arguments.json)
    if failed:
        raise UserError("; ".join(failed))
    return 0


if __name__ == "__main__":
    cli.run(main)
