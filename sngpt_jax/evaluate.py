"""Scores a trained model: `python -m sngpt_jax.evaluate --run runs/quickstart`, or `--artifact F`,
in bits per byte of validation text or of any text, and on downstream tasks.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.config import ExportConfig, changed
from sngpt_jax.config.checks import validate
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import (
    EvalTokensOption,
    Json,
    KernelsOption,
    OptionalInt,
    OptionalPath,
    Quiet,
    WeightsOption,
)
from sngpt_jax.config.recipe import peek
from sngpt_jax.data.corpus.reading import USUAL, Reading
from sngpt_jax.evaluation.options import StreamOptions

logger = logging.getLogger("sngpt_jax")

Spec = dict[str, Path | None]  # a published file by task; None: the task is lm-eval's own
LM_EVAL = "lm-eval>=0.4.12"  # tasks load differently in earlier versions


@dataclass(frozen=True)
class EvaluateArguments:
    run: OptionalPath = None  # run directory of a trained model
    artifact: OptionalPath = None  # exported model, *.sngpt, instead of a run
    data: OptionalPath = None  # folder with prepared validation shards; default: the run's data
    # file or folder of text to score instead, each document by itself; -: standard input
    text: str = ""
    # key or column with the text, in .jsonl, .json, .csv and .parquet files of --text
    text_key: str = USUAL.text_key
    split_on: str = USUAL.split_on  # cut text files of --text at this text; empty: as `prepare`
    per_document: OptionalPath = None  # file for the score of each document of --text, JSON lines
    allow_overlap: bool = False  # score --data or --text, though the model was trained on a part
    step: OptionalInt = None  # checkpoint to score; default: the latest checkpoint
    weights: WeightsOption = None
    fake_quantize: bool = False  # score the weights that `export` would write, without writing them
    # export settings for --fake-quantize; default: the run's settings
    export: Annotated[ExportConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=ExportConfig
    )
    stream: Annotated[StreamOptions, tyro.conf.arg(name="")] = field(default_factory=StreamOptions)
    # downstream tasks: hellaswag=PATH,lambada=PATH,squad=PATH, or names of lm-eval's tasks
    tasks: str = ""
    task_limit: int = 0  # number of samples to take from the start of each task; 0: all
    task_definitions: OptionalPath = None  # folder with more task files for lm-eval, YAML
    device_batch_tokens: EvalTokensOption = None
    kernels: KernelsOption = "check"
    json: Json = ""
    quiet: Quiet = False
    processes: Annotated[ProcessArguments, tyro.conf.arg(name="")] = field(
        default_factory=ProcessArguments
    )

    @property
    def reading(self) -> Reading:
        """How --text is read. Raises `UserError`."""
        return Reading(self.text_key, self.split_on)


def check(arguments: EvaluateArguments, default: EvaluateArguments) -> None:
    """Raises `UserError` for options that are wrong or change nothing."""
    exported = arguments.export != default.export and not arguments.fake_quantize
    unscored = arguments.stream.mode == "none" and not arguments.tasks
    text = arguments.text
    of_tasks = bool(arguments.task_limit or arguments.task_definitions)
    problems = arguments.stream.problems() | {
        "--task-limit cannot be negative; 0 takes all samples": arguments.task_limit < 0,
        "--fake-quantize is for a --run; an artifact is already quantized": arguments.fake_quantize
        and arguments.artifact is not None,
        "--export options change nothing without --fake-quantize": exported,
        "--allow-overlap is for --data and --text": arguments.allow_overlap
        and not (arguments.data or text),
        "--text and --data both name what to score; remove one of them": bool(
            text and arguments.data
        ),
        "--per-document, --text-key and --split-on are for --text": not text
        and (arguments.per_document is not None or arguments.reading != USUAL),
        "--text scores every document whole, in windows of its own; remove --mode none, --tokens,"
        " --tail and --ngram": bool(text) and not arguments.stream.is_plain,
        "--mode none scores no stream; name --tasks, or remove --mode none": unscored,
        "--task-limit and --task-definitions are for --tasks": of_tasks and not arguments.tasks,
    }
    for message, wrong in problems.items():
        if wrong:
            raise UserError(message)
    cli.check_json(arguments.json)
    if arguments.per_document:
        check_writable(arguments.per_document, "--per-document")


def parse_tasks(arguments: EvaluateArguments) -> Spec:
    """The tasks that `--tasks` names."""
    if not arguments.tasks:
        return {}
    try:
        from sngpt_jax.evaluation import tasks
    except ImportError as missing:
        if (missing.name or "").partition(".")[0] not in ("lm_eval", "datasets"):
            raise
        install = cli.command("pip", "install", LM_EVAL)
        raise UserError(f"--tasks needs the package {LM_EVAL}; install it: {install}") from missing
    return tasks.parse_tasks(arguments.tasks, arguments.task_definitions)


def main(argv: Sequence[str]) -> int:
    default = EvaluateArguments()
    if run := peek(argv, "--run"):
        from sngpt_jax.run.directory import read_config

        default = EvaluateArguments(export=read_config(Path(run)).export)
    arguments = parse(
        EvaluateArguments,
        cli.expand_json(argv),
        default=default,
        program="python -m sngpt_jax.evaluate",
        description="Scores a trained model: nats per token, bits per byte and downstream tasks.",
    )
    check(arguments, default)
    spec = parse_tasks(arguments)
    cli.log_to_stderr(arguments.quiet)
    from sngpt_jax.cluster import processes  # jax takes seconds to import, and --help needs none

    with processes.joined(arguments.processes):
        return evaluate(arguments, spec)


def following(arguments: EvaluateArguments) -> list[str]:
    """The commands that a person may type next."""
    if not arguments.run:
        return []
    run = str(arguments.run)
    chosen = ["--step", str(arguments.step)] if arguments.step is not None else []
    chosen += ["--weights", arguments.weights] if arguments.weights else []
    return [cli.command("sngpt_jax.export", "--run", run, *chosen, "--out", f"{run}/model.sngpt")]


def evaluate(arguments: EvaluateArguments, spec: Spec) -> int:
    """Scores the model of `arguments`, prints or writes the result, and returns the exit status."""
    import jax

    from sngpt_jax import __version__
    from sngpt_jax.cluster import processes
    from sngpt_jax.cluster.mesh import make_mesh
    from sngpt_jax.data.overlap import refuse_trained_data
    from sngpt_jax.evaluation import documents, report
    from sngpt_jax.run.console import progress_reporter
    from sngpt_jax.weights.quantized_model import quantize_variables
    from sngpt_jax.weights.source import open_model

    stream = arguments.stream
    options = vars(arguments) | vars(stream)
    for own in ("stream", "processes", "json", "quiet"):
        del options[own]
    alike = {name: repr(value) for name, value in options.items()}
    processes.check_alike({"version": f"{__version__}, jax {jax.__version__}"} | alike)
    mesh = make_mesh()
    model = open_model(
        arguments.run,
        arguments.artifact,
        mesh,
        arguments.step,
        arguments.weights,
        arguments.kernels,
    )
    config, variables = model.config, model.variables
    if arguments.run:
        config = validate(replace(config, export=arguments.export))
    if arguments.device_batch_tokens is not None:
        config = validate(
            changed(config, eval={"device_batch_tokens": arguments.device_batch_tokens})
        )
    dataset = text = None
    if arguments.text:
        given = arguments.text, arguments.reading, model.tokenizer()
        if arguments.allow_overlap:
            text = documents.encode(*given, cut=0)
        else:
            text = documents.encode_untrained(*given, Path(config.data.dir))
        processes.check_alike({"text": str(text.name)})
    if (stream.mode != "none" and not text) or arguments.fake_quantize:
        dataset = model.open_data(arguments.data)
        if not arguments.allow_overlap:
            refuse_trained_data(dataset, Path(config.data.dir))
        digest = dataset.tokenizer.sha256
        processes.check_alike({"validation tokens": len(dataset.val), "tokenizer": digest})
    if arguments.fake_quantize:
        assert dataset
        progress = progress_reporter("calibrate")
        variables = quantize_variables(variables, config, dataset, mesh, progress)

    result: dict[str, Any] = {"step": model.step, "weights": model.weights}
    result["fake_quantized"] = arguments.fake_quantize
    kept = " as export would keep them" if arguments.fake_quantize else ""
    rows = [("model", f"{model.source}, step {model.step}, {model.weights} weights{kept}")]
    if stream.mode != "none":
        if text:
            scored, each = documents.score(stream, config, variables, text, mesh)
        else:
            assert dataset
            scored, each = report.score(stream, config, variables, dataset, mesh), []
        result = scored | result
        if not math.isfinite(loss := result["loss"]):
            remedy = "export other weights" if arguments.artifact else "take an earlier --step"
            raise UserError(f"{model.source}: the loss of step {model.step} is {loss}; {remedy}")
        rows += report.describe(result)
        if arguments.per_document and processes.index() == 0:
            write_text_atomic(arguments.per_document, documents.as_lines(each))
            rows.append(("each", f"{len(each):,} documents: {arguments.per_document}"))
        if spec and processes.index() == 0:
            logger.info("%s; the tasks follow", rows[1][1])
    failed = []
    if spec:
        from sngpt_jax.evaluation import tasks
        from sngpt_jax.evaluation.likelihood import LanguageModel

        tokenizer = model.tokenizer() if model.tokenizer_path or not dataset else dataset.tokenizer
        result["tasks"] = tasks.run_tasks(
            LanguageModel(config, variables, tokenizer, mesh),
            spec,
            limit=arguments.task_limit,
            include=arguments.task_definitions,
            progress=progress_reporter,
        )
        for name, metrics in result["tasks"].items():
            texts = {key: f"{x:.5g}" if isinstance(x, float) else x for key, x in metrics.items()}
            rows.append((name, ", ".join(f"{key} {text}" for key, text in texts.items())))
            if "error" in metrics:
                failed.append(f"{name}: {metrics['error']}")
    if processes.index() == 0:
        if arguments.json != "-":
            terminal.show_result("evaluated", rows, [] if failed else following(arguments))
        cli.write_json(result, arguments.json)
    if failed:
        raise UserError("; ".join(failed))
    return 0


if __name__ == "__main__":
    cli.run(main)
