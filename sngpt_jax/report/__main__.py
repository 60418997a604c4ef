"""Runs side by side as one HTML page: `python -m sngpt_jax.report runs/a runs/b --out page.html`.

The page needs nothing else: curves, health of sparse codes, differing settings, exports,
evaluations and environments. Runs that differ only in `train.seed` are also shown as one, with
mean and standard deviation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sngpt_jax.base import cli, webpage
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable
from sngpt_jax.config.options import OptionalPath, Quiet
from sngpt_jax.report.live import LiveRuns, make_server, now
from sngpt_jax.report.page import page, report
from sngpt_jax.report.reading import read_run
from sngpt_jax.run.console import progress_reporter


@dataclass(frozen=True)
class ReportArguments:
    # run directories
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    out: OptionalPath = None  # the HTML page to write; opens in any browser
    # serve the page on this machine, as the runs go on, until Ctrl-C; --out is then written at its
    # end
    live: bool = False
    port: int = 8631  # of --live; 0: any that is free
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(
        ReportArguments,
        args=list(argv),
        prog="python -m sngpt_jax.report",
        description=(
            "Compares runs: one HTML page with curves and tables, or with --live a page that"
            " follows them."
        ),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if not arguments.runs:
        raise UserError("no run to report on; give one run directory or more")
    if not (arguments.out or arguments.live):
        raise UserError("--out names no page; give --out page.html, or --live")
    directories: dict[Path, Path] = {}  # each once, under the first name it was given by
    for directory in arguments.runs:
        directories.setdefault(directory.resolve(), directory)
    if arguments.out:
        check_writable(arguments.out, "--out")
    cli.log_to_stderr(arguments.quiet)
    if not arguments.live:
        runs, progress = [], progress_reporter("read")
        for directory in directories.values():
            runs.append(read_run(directory))
            progress(len(runs), len(directories))
        _write(arguments.out, report(runs, now()))
        return 0
    live = LiveRuns([*directories.values()])
    live.data()  # what is no run is said at once
    with make_server(live, arguments.port) as server:
        try:
            print(f"http://localhost:{server.server_address[1]}/ until Ctrl-C", flush=True)
            server.serve_forever()
        finally:
            if arguments.out:
                _write(arguments.out, live.data() | {"live": "", "written": now()})
    return 0


def _write(out: Path | None, data: dict[str, object]) -> None:
    if out:
        webpage.write(out, page(data))
        count = len(data["runs"]) if isinstance(data["runs"], list) else 0
        print(f"{count} run{'s' * (count != 1)}: {out}")


if __name__ == "__main__":
    cli.run(main)
