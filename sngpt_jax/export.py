"""A run as one small file: `python -m sngpt_jax.export --run runs/quickstart --out model.sngpt`.

The command writes the artifact, and beside it the program that decodes and scores the artifact,
`model.pyz`, and the tokenizer. The bytes of artifact and program count.
"""

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import tyro

from sngpt_jax.base import cli, terminal
from sngpt_jax.base.errors import EXIT_OVER_LIMIT, UserError
from sngpt_jax.base.files import check_writable
from sngpt_jax.config import ExportConfig
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import (
    EvalTokensOption,
    Json,
    OptionalInt,
    OptionalPath,
    Quiet,
    WeightsOption,
)
from sngpt_jax.config.recipe import peek

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class ExportArguments:
    run: Path  # run directory of a trained model
    out: Path  # artifact to write, *.sngpt; the program and the tokenizer are written beside it
    # folder with prepared shards for scores and calibration; default: the run's
    data: OptionalPath = None
    step: OptionalInt = None  # checkpoint to export; default: the latest
    weights: WeightsOption = None
    # bytes that artifact and program may take together; more is exit status 4; 0: no limit
    limit: int = 0
    # search for the policy of least error within --limit, instead of the run's
    tune_to_fit: bool = False
    # score the model before and after the export, instead of a comparison of the tensors alone
    score: bool = True
    tokens: int = 65_536  # validation tokens to score, from the start of the stream; 0: all
    export: Annotated[ExportConfig, tyro.conf.FlagConversionOff] = field(
        default_factory=ExportConfig
    )  # the policy; default: the run's
    device_batch_tokens: EvalTokensOption = None
    json: Json = ""
    quiet: Quiet = False


def check(arguments: ExportArguments) -> None:
    """Raises `UserError` for impossible arguments, before any work."""
    out, json = arguments.out, arguments.json
    if out.suffix != ".sngpt":
        raise UserError(f"--out {out}: expected a file named *.sngpt")
    if arguments.limit < 0 or arguments.tokens < 0:
        raise UserError("--limit and --tokens are 0 or more")
    if arguments.tune_to_fit and not arguments.limit:
        raise UserError("--tune-to-fit needs --limit, the bytes to fit into")
    written = (out, out.with_suffix(".pyz"))
    for path in written:
        check_writable(path, "--out")
        if path.exists() and not path.is_file():
            raise UserError(f"--out {path}: is a pipe or a device; the export needs a plain file")
    if json not in ("", "-") and Path(json).resolve() in [path.resolve() for path in written]:
        raise UserError(f"--json {json}: is written by --out; give the path of another file")
    cli.check_json(json)


def print_result(
    result: dict[str, Any], table: str, files: Sequence[Path], data: Path | None, quiet: bool
) -> None:
    """The export for a person: the bytes and the scores; unless `quiet`, the `table` of the groups
    of tensors and the contents of the program too.
    """
    if not quiet:
        terminal.clear()
        print(table)
        titles = {"program_files": "contains", "libraries": "needs the libraries"}
        for key, title in titles.items():
            text = textwrap.fill(", ".join(result[key]), 98, break_on_hyphens=False)
            print(f"\nthe program {title}\n{textwrap.indent(text, '  ')}")
    limit, total, header = result["limit"], result["total_bytes"], result["header_bytes"]
    over = total - limit
    verdict = (
        f", {over:,} over the limit of {limit:,}" if over > 0 else f", {-over:,} below the limit"
    )
    rows = [
        ("artifact", f"{result['artifact_bytes']:>12,} bytes, including a header of {header:,}"),
        ("program", f"{result['code_bytes']:>12,} bytes"),
        ("total", f"{total:>12,} bytes{verdict if limit else ''}"),
        *((f"level {level}", f"{n:>12,} streams") for level, n in result["codec_levels"].items()),
        *(("wrote", str(file)) for file in files),
    ]
    if scores := result.get("score"):
        both = f"{scores['bpb_before']:.5f} before, {scores['bpb_after']:.5f} by the program"
        gap = f"gap {scores['gap']:+.5f}, over {scores['tokens']:,} tokens"
        rows.append(("bits/byte", f"{both} from the file, {gap}"))
    options = ["--artifact", str(files[0]), *(["--data", str(data)] if data else [])]
    following = [cli.command("sngpt_jax.evaluate", *options)] if result["fits"] else []
    terminal.show_result("exported", rows, following)


def main(argv: Sequence[str]) -> int:
    run, missing = peek(argv, "--run"), cast(Any, tyro.MISSING)
    export = ExportConfig()
    if run:
        from sngpt_jax.run.directory import read_config  # imports jax

        export = read_config(Path(run)).export
    arguments = parse(
        ExportArguments,
        cli.expand_json(argv),
        default=ExportArguments(Path(run) if run else missing, missing, export=export),
        program="python -m sngpt_jax.export",
        description="Quantizes and compresses a model into one file, and accounts for every byte.",
    )
    check(arguments)
    cli.log_to_stderr(arguments.quiet)
    from sngpt_jax.weights.exporter import export_run  # imports jax

    files, table, result = export_run(
        arguments.run,
        arguments.out,
        arguments.export,
        data=arguments.data,
        step=arguments.step,
        weights=arguments.weights,
        limit=arguments.limit,
        tune_to_fit=arguments.tune_to_fit,
        tokens=arguments.tokens if arguments.score else None,
        device_batch_tokens=arguments.device_batch_tokens,
    )
    limit = arguments.limit
    if arguments.json != "-":
        print_result(result, table, files, arguments.data, arguments.quiet)
    cli.write_json(result, arguments.json)
    if result["fits"]:
        return 0
    over = f"{result['total_bytes'] - limit:,} bytes over --limit {limit:,}"
    remedy = "raise --limit" if arguments.tune_to_fit else "try --tune-to-fit"
    logger.error(f"error: {arguments.out} is {over}; {remedy}")
    return EXIT_OVER_LIMIT


if __name__ == "__main__":
    cli.run(main)
