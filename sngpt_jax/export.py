"""A run as one small file: `python -m sngpt_jax.export --run runs/quickstart --out model.sngpt`.

Beside the artifact are written the program that decodes and scores it, `model.pyz`, and its
tokenizer. Both bytes count, the program's and the artifact's; the tokenizer is the data's.
"""

import contextlib
import fcntl
import functools
import logging
import math
import os
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

import sngpt_jax
from sngpt_jax.artifact import account as report
from sngpt_jax.artifact import bundle, fit
from sngpt_jax.artifact import file as artifact
from sngpt_jax.artifact.account import GroupReport
from sngpt_jax.artifact.bundle import Bundle
from sngpt_jax.artifact.file import Encoded
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Stored, dequantize
from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import EXIT_OVER_LIMIT, UserError
from sngpt_jax.base.files import check_writable, write_bytes_atomic
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, ExportConfig
from sngpt_jax.config.checks import validate
from sngpt_jax.config.options import Json, OptionalInt, OptionalPath, Quiet, WeightsOption
from sngpt_jax.config.recipe import peek
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.run.console import progress_reporter
from sngpt_jax.run.directory import read_config
from sngpt_jax.weights.quantized_model import calibrate, host_tensors
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import TrainedModel, tokenizer_beside

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class ExportArguments:
    run: Path  # run directory of a trained model
    out: Path  # artifact to write, *.sngpt; the program and the tokenizer are written beside it
    # folder with prepared shards, to score and to calibrate on; default: the run's
    data: OptionalPath = None
    step: OptionalInt = None  # checkpoint to export; default: the latest
    weights: WeightsOption = None
    limit: int = 0  # bytes that artifact and program may take together, or exit status 4; 0: any
    # search for the policy that loses least within --limit, instead of the one of --export
    tune_to_fit: bool = False
    score: bool = True  # score the model before and after; without, the tensors alone are compared
    tokens: int = 65_536  # validation tokens to score, from the start of the stream; 0: all
    export: Annotated[ExportConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=ExportConfig
    )  # the policy; default: the run's
    json: Json = ""
    quiet: Quiet = False


def check(arguments: ExportArguments) -> None:
    """Raises `UserError` for what cannot work, before any work."""
    if arguments.out.suffix != ".sngpt":
        raise UserError(f"--out {arguments.out}: expected a file named *.sngpt")
    if arguments.limit < 0 or arguments.tokens < 0:
        raise UserError("--limit and --tokens are 0 or more")
    if arguments.tune_to_fit and not arguments.limit:
        raise UserError("--tune-to-fit needs --limit, the bytes to fit into")
    for path in outputs(arguments.out):
        check_writable(path, "--out")
    if arguments.json not in ("", "-"):
        if Path(arguments.json).resolve() in [path.resolve() for path in outputs(arguments.out)]:
            raise UserError(
                f"--json {arguments.json}: is written by --out; give the path of another file"
            )
        check_writable(Path(arguments.json), "--json")


def outputs(out: Path) -> tuple[Path, Path]:
    """The artifact and the program that scores it."""
    return out, out.with_suffix(".pyz")


def metadata(model: TrainedModel, config: Config) -> dict[str, Any]:
    """What the artifact says of itself beside its tensors."""
    kept = model.tokenizer_path
    return {
        "config": asdict(config),
        "tokenizer": {"sha256": model.tokenizer_sha256, "suffix": kept.suffix} if kept else None,
        "step": model.step,
        "weights": model.weights,
        "version": sngpt_jax.__version__,
    }


def verify(path: Path, stored: Mapping[str, Stored]) -> None:
    """Reads the artifact back and compares every tensor, bit by bit, with the one in memory.
    Raises RuntimeError: a bug.
    """
    found = artifact.read(path).tensors
    differing = sorted(found.keys() ^ stored.keys()) or [
        name
        for name in stored
        if dequantize(found[name]).tobytes() != dequantize(stored[name]).tobytes()
    ]
    if differing:
        raise RuntimeError(f"{path}: does not hold what was exported: {', '.join(differing)}")


@contextlib.contextmanager
def _hidden(folder: Path) -> Iterator[Path]:
    """A new hidden folder in `folder`, which does not outlive the body; those that killed exports
    left behind go first.
    """
    for leftover in folder.glob(".export-*"):
        with _lock(leftover) as abandoned:
            if abandoned:
                shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name, _lock(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Holds the folder until the body or the process ends; whether nobody else did."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held; or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def publish(
    files: Mapping[str, bytes],
    folder: Path,
    stored: Mapping[str, Stored],
    data: Path | None,
    tokens: int,
) -> Any:
    """Puts artifact, program and tokenizer, in this order, into `folder`; returns what the program
    says of the artifact.

    They come there once the artifact is verified and the program has run: until then they lie in a
    hidden folder beside. Raises `UserError` where they cannot be written.
    """
    try:
        with _hidden(folder) as hidden:
            made = [hidden / name for name in files]
            for path, content in zip(made, files.values(), strict=True):
                write_bytes_atomic(path, content)
            verify(made[0], stored)
            said = bundle.run(
                made[1], made[0], data, tokens, progress_reporter("score by the program")
            )
            for path in reversed(made):  # the artifact last: where it is, the others are
                os.replace(path, folder / path.name)
    except OSError as error:
        raise UserError(
            f"--out {folder / next(iter(files))}: cannot be written: {error.strerror}"
        ) from None
    return said


def result_of(
    arguments: ExportArguments,
    model: TrainedModel,
    config: Config,
    encoded: Encoded,
    lines: Sequence[GroupReport],
    program: Bundle,
) -> dict[str, Any]:
    """The figures of the command but for the scores, as nested plain values."""
    total = len(encoded.data) + len(program.data)
    return {
        "artifact_bytes": len(encoded.data),
        "code_bytes": len(program.data),
        "total_bytes": total,
        "header_bytes": encoded.header_bytes,
        "limit": arguments.limit,
        "fits": not arguments.limit or total <= arguments.limit,
        "parameters": sum(line.weights for line in lines),
        "bits_per_weight": report.as_json(lines),
        "policy": asdict(config.export),
        "step": model.step,
        "weights": model.weights,
        "program_files": dict(program.files),
        "libraries": list(program.libraries),
    }


def print_result(
    result: dict[str, Any],
    lines: Sequence[GroupReport],
    files: Sequence[Path],
    data: Path | None,
    quiet: bool,
) -> None:
    """The result for a person: what each group takes, and the sum of it; the sum alone if `quiet`."""
    if not quiet:
        terminal.clear()
        print(report.format_table(lines))
        print("\nthe program is made of")
        console = terminal.TerminalConsole(sys.stdout)
        fill = functools.partial(
            textwrap.fill,
            width=min(120, console.width) if console.has_cursor else 120,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        print(fill(", ".join(result["program_files"])))
        print(fill(f"to run with {', '.join(result['libraries'])}"))
    limit, over = result["limit"], result["total_bytes"] - result["limit"]
    verdict = (
        ""
        if not limit
        else (
            f", {-over:,} below the limit"
            if over <= 0
            else f", {over:,} over the limit of {limit:,}"
        )
    )
    rows = [
        (
            "artifact",
            f"{result['artifact_bytes']:>12,} bytes, of which header {result['header_bytes']:,}",
        ),
        ("program", f"{result['code_bytes']:>12,} bytes"),
        ("total", f"{result['total_bytes']:>12,} bytes{verdict}"),
        *(("wrote", str(file)) for file in files),
    ]
    if scores := result.get("score"):
        before_and_after = (
            f"{scores['bpb_before']:.5f} before, {scores['bpb_after']:.5f} by the program from the"
            " file"
        )
        rows.append(
            (
                "bits/byte",
                f"{before_and_after}, gap {scores['gap']:+.5f}, over {scores['tokens']:,} tokens",
            )
        )
    score = cli.command(
        "sngpt_jax.evaluate", "--artifact", str(files[0]), *(["--data", str(data)] if data else [])
    )
    terminal.show_result("exported", rows, [score] if result["fits"] else [])


def main(argv: Sequence[str]) -> int:
    run, missing = peek(argv, "--run"), cast(Any, tyro.MISSING)
    export = read_config(Path(run)).export if run else ExportConfig()
    arguments = tyro.cli(
        ExportArguments,
        args=cli.expand_json(argv),
        default=ExportArguments(Path(run) if run else missing, missing, export=export),
        prog="python -m sngpt_jax.export",
        description=(
            "Quantizes and compresses a trained model into one file, verifies it, and accounts for"
            " every byte."
        ),
    )
    check(arguments)
    cli.log_to_stderr(arguments.quiet)
    mesh = make_mesh()
    model = load_model(arguments.run, mesh, arguments.step, arguments.weights)
    config = validate(replace(model.config, export=arguments.export))
    dataset = model.open_data(arguments.data) if arguments.score or config.export.gptq else None
    before = None
    if arguments.score and dataset:
        before = score_validation(
            config, model.variables, dataset, mesh, arguments.tokens, progress_reporter("score")
        )
        if not math.isfinite(before.loss):
            raise UserError(
                f"{arguments.run}: the loss of step {model.step} is {before.loss}; take an earlier"
                " --step"
            )

    program, tensors = bundle.build(), host_tensors(model.variables)
    moments = (
        calibrate(model.variables, config, dataset, mesh, progress_reporter("calibrate"))
        if dataset
        else None
    )
    if arguments.tune_to_fit:
        if arguments.limit <= len(program.data):
            raise UserError(
                f"--limit {arguments.limit:,} is less than the program alone, {len(program.data):,}"
                " bytes"
            )
        about = functools.partial(metadata, model)
        config = fit.search(
            tensors, config, about, arguments.limit - len(program.data), logger.info, moments
        )
    stored = quantize_tensors(tensors, config, moments, progress_reporter("quantize"))
    storage = fit.storage_of(config.export)
    encoded = artifact.encode(
        metadata(model, config), stored, storage, progress=progress_reporter("encode")
    )
    unpacked = None
    if storage.packed:  # what packing costs is known by doing without
        unpacked = artifact.encode(
            {},
            stored,
            replace(storage, packed=False),
            progress=progress_reporter("encode unpacked"),
        )

    kept = model.tokenizer_path
    files = {
        path.name: content
        for path, content in zip(outputs(arguments.out), (encoded.data, program.data), strict=True)
    }
    if kept:
        files[tokenizer_beside(arguments.out, kept.suffix).name] = kept.read_bytes()
    scored = publish(
        files,
        arguments.out.parent,
        stored,
        dataset.directory if before and dataset else None,
        arguments.tokens,
    )
    lines = report.report(tensors, stored, encoded, config, unpacked)
    result = result_of(arguments, model, config, encoded, lines, program)
    if before:
        after = scored["bpb"]
        result["score"] = {
            "tokens": before.tokens,
            "bpb_before": before.bpb,
            "bpb_after": after,
            "gap": after - before.bpb,
        }
    if arguments.json != "-":
        print_result(
            result,
            lines,
            [arguments.out.parent / name for name in files],
            arguments.data,
            arguments.quiet,
        )
    cli.write_json(result, arguments.json)
    if not result["fits"]:
        over = result["total_bytes"] - arguments.limit
        remedy = "raise --limit" if arguments.tune_to_fit else "try --tune-to-fit"
        logger.error(
            f"error: {arguments.out} is {over:,} bytes over --limit {arguments.limit:,}; {remedy}"
        )
        return EXIT_OVER_LIMIT
    return 0


if __name__ == "__main__":
    cli.run(main)
