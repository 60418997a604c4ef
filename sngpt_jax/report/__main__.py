"""Compares runs on one HTML page: `python -m sngpt_jax.report runs/a runs/b --out page.html`.

Runs that differ only in `train.seed` are also shown as one, with mean and standard deviation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import check_writable
from sngpt_jax.base.terminal import progress_reporter
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import OptionalPath, Quiet


@dataclass(frozen=True)
class ReportArguments:
    # run directories
    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN …]", help_behavior_hint=""),
    ]
    out: OptionalPath = None  # the HTML page to write; opens in any browser
    # serve a page on this machine that follows the runs until Ctrl-C; --out is written at the end
    live: bool = False
    port: int = 8631  # port of the served page; 0: any free port
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status. Raises `UserError`."""
    arguments = parse(
        ReportArguments,
        argv,
        program="python -m sngpt_jax.report",
        description=(
            "Compares runs: one HTML page with curves and tables, or with --live a page that"
            " follows them."
        ),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    out = arguments.out
    if not arguments.runs:
        raise UserError("no run to report on; give one run directory or more")
    if out:
        check_writable(out, "--out")
    elif not arguments.live:
        raise UserError("--out names no page; give --out page.html, or --live")
    named: dict[Path, Path] = {}  # each directory once, by the first path given for it
    for path in arguments.runs:
        named.setdefault(path.resolve(), path)
    cli.log_to_stderr(arguments.quiet)
    from sngpt_jax.report import live, page, reading  # take seconds to import

    if arguments.live:
        runs = live.LiveRuns(list(named.values()))
        runs.data()  # raises for a directory that is no run
        with live.make_server(runs, arguments.port) as server:
            try:
                print(f"http://localhost:{server.server_address[1]}/ until Ctrl-C", flush=True)
                server.serve_forever()
            finally:
                if out:
                    page.write(out, runs.data() | {"live": "", "written": live.now()})
    elif out:
        found, progress = [], progress_reporter("read")
        for directory in named.values():
            found.append(reading.read_run(directory))
            progress(len(found), len(named))
        page.write(out, page.report(found, live.now()))
    return 0


if __name__ == "__main__":
    cli.run(main)
