"""What a person sees of a run on the console: one line a step, a live one on a terminal, plain
ones otherwise.
"""

import contextlib
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from sngpt_jax.base import terminal
from sngpt_jax.base.cli import drop_output
from sngpt_jax.base.terminal import (
    BAR_WIDTH,
    Progress,
    Report,
    Rows,
    TerminalConsole,
    format_duration,
)
from sngpt_jax.cluster import processes
from sngpt_jax.run.metrics import Record

logger = logging.getLogger("sngpt_jax")

WIDTH = 120  # columns that no line passes where there is no terminal

_COLUMNS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("train_loss", lambda x: f"loss {x:.4f}"),
    ("val_loss", lambda x: f"loss {x:.4f}"),
    ("val_bpb", lambda x: f"bpb {x:.4f}"),
    ("val_seconds", lambda x: f"{x:.1f} s"),
    ("lr", lambda x: f"lr {x:.3g}"),
    ("grad_norm", lambda x: f"grad {x:.3g}"),
    ("step_ms", lambda x: f"{x:.1f} ms" if x < 999.95 else f"{x / 1e3:.2f} s"),
    ("tok_per_s", lambda x: f"{x:,.0f} tok/s"),
    ("mfu", lambda x: f"mfu {x:.1%}"),
    ("eta", lambda x: f"eta {format_duration(x)}"),
)


# What a line too long for the terminal does without, first to last.
_DISPENSABLE = ("grad_norm", "lr", "step_ms", "percent", "mfu", "tok_per_s")


def format_step(
    record: Mapping[str, Any],
    total_steps: int,
    width: int | None = None,
    *,
    share: float | None = None,
) -> str:
    """`step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.04 │ 123.4 ms │ 66,400 tok/s │ mfu 41.2% │
    eta 3m12s`.

    A record with validation numbers begins with `val` instead. What a record lacks is left out,
    and what matters least until the line fits `width` columns, if it can; `eta` is in seconds.
    `share` of the run that is done: that of the steps, unless given.
    """
    digits = max(5, len(str(total_steps)))
    head = "val " if any(name.startswith("val_") for name in record) else "step"
    step = record["step"]
    place = f"{head} {step:0{digits}d}/{total_steps:0{digits}d}"
    percent = f" ({step / total_steps if share is None else share:5.1%})"
    shown = {name: show(record[name]) for name, show in _COLUMNS if record.get(name) is not None}
    for name in ("", *_DISPENSABLE):  # whole first
        if name == "percent":
            percent = ""
        shown.pop(name, None)
        line = " │ ".join([place + percent, *shown.values()])
        if width is None or len(line) <= width:
            break
    return line


class Console:
    """What a person sees of a run, on stdout: on a terminal colours and a live last line,
    otherwise plain lines.

    Of the steps it prints the first ten and the last, and between them a line about every
    hundredth of the time passed, 2 to 30 seconds; the live line shows every step. Validations and
    headers are always printed. With `quiet` the result alone is. Where nobody reads them any more
    the lines are dropped and the run goes on.
    """

    def __init__(
        self,
        total_steps: int,
        max_seconds: float = 0.0,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`max_seconds` of training after which the run ends, whatever its steps; 0: never."""
        self._total, self._max_seconds = total_steps, max_seconds
        self.quiet = quiet
        self._clock = clock
        self._rich = TerminalConsole(stream or sys.stdout)
        if not self._rich.has_cursor:
            self._rich.width = WIDTH
        self._start = self._next = clock()
        self._printed = 0
        self._latest: Record | None = None
        self._latest_is_printed = True
        self._has_live = self._rich.has_cursor and not quiet and processes.index() == 0
        self._live: rich.live.Live | None = None
        self._aside: Progress | None = None  # what the live line shows in place of the step

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_live()
        self.flush()

    def _begin_live(self) -> None:
        """Shows the live line from here on: not before there is something in it, as what is drawn
        by others would collide.
        """
        if self._has_live and self._live is None:
            self._live = rich.live.Live(
                get_renderable=self._status,
                console=self._rich,
                refresh_per_second=4,
                transient=True,
                auto_refresh=True,
                redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
            )
            self._live.start()

    def _end_live(self) -> None:
        self._has_live = False
        if self._live is not None:
            with self._expecting_loss():
                self._live.stop()
            self._live = None

    def _share(self, record: Record) -> float:
        """How much of the run is done by its steps or by its clock, whichever is further."""
        share = float(record["step"]) / self._total
        if self._max_seconds:
            timed = record if "elapsed_seconds" in record else self._latest or {}
            share = max(share, float(timed.get("elapsed_seconds") or 0.0) / self._max_seconds)
        return min(share, 1.0)

    def _format(self, record: Record, width: int | None = None) -> str:
        return format_step(record, self._total, width, share=self._share(record))

    def _status(self) -> rich.console.RenderableType:
        """The live line; called four times a second by rich's own thread, so that a step costs
        only keeping its record.
        """
        columns = self._rich.width
        if self._aside is not None:
            return self._aside.drawing(columns)
        if self._latest is None:
            return rich.text.Text()
        record = self._latest
        text = rich.text.Text(self._format(record, columns), no_wrap=True, overflow="ellipsis")
        if len(self._format(record)) + BAR_WIDTH + 1 > columns:
            return text
        line = rich.table.Table.grid(padding=(0, 1))
        line.add_row(
            rich.progress_bar.ProgressBar(
                1.0, self._share(record), width=BAR_WIDTH, complete_style="cyan"
            ),
            text,
        )
        return line

    def progress(self, label: str) -> Report:
        """A function of (done, total) for work beside the steps: shown in the live line, where
        there is one, while it lasts.
        """
        self._begin_live()
        if self._live is None:
            return progress_reporter(label)
        aside = Progress(label, self._clock)

        def report(done: float, total: float, note: str = "") -> None:
            aside.reach(done, total, note)
            self._aside = None if done == total else aside

        return report

    def print(self, text: str, style: str = "") -> None:
        """Text as it is; where there is no terminal its lines are cut at the width."""
        if processes.index() == 0 and not self.quiet:
            if not self._rich.has_cursor:
                text = "\n".join(
                    line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
                    for line in text.split("\n")
                )
            with self._expecting_loss():
                self._rich.print(rich.text.Text(text, style=style), soft_wrap=True)
                self._rich.file.flush()

    @contextlib.contextmanager
    def _expecting_loss(self) -> Iterator[None]:
        """Goes on without stdout where that cannot be written: a full disk, a closed terminal are
        no reason to lose a run.
        """
        try:
            yield
        except OSError as error:
            if self._rich.file is not sys.stdout:
                raise
            drop_output()
            if not isinstance(error, BrokenPipeError):
                logger.warning(
                    f"stdout: cannot be written: {error.strerror}; the run goes on without"
                )

    def header(self, title: str, pairs: Iterable[tuple[str, str]]) -> None:
        """A title and a (name, value) a line: the quantities that a recipe comes to."""
        rows = list(pairs)
        width = max((len(name) for name, _ in rows), default=0)
        self.print(title, "bold")
        for name, value in rows:
            for line in textwrap.wrap(value, WIDTH - width - 4) or [""]:
                self.print(f"  {name:<{width}}  {line}")
                name = ""

    def result(self, title: str, rows: Rows, following: Sequence[str] = ()) -> None:
        """The run's result and the commands to type next, as `terminal.show_result` has them."""
        if processes.index() == 0:
            self.flush()
            self._end_live()
            with self._expecting_loss():
                terminal.show_result(title, rows, following, console=self._rich)

    def step(self, record: Record) -> None:
        """A training step's record: shown live, and printed when its turn has come."""
        self._latest, self._latest_is_printed = record, False
        self._begin_live()
        now = self._clock()
        if self._printed < 10 or now >= self._next or record["step"] == self._total:
            self._next = now + min(max((now - self._start) / 100, 2.0), 30.0)
            self._print_step(record)

    def flush(self) -> None:
        """Prints the latest step, if its turn had not come."""
        if self._latest is not None and not self._latest_is_printed:
            self._print_step(self._latest)

    def _print_step(self, record: Record) -> None:
        self._printed += 1
        self._latest_is_printed = True
        self.print(self._format(record, self._rich.width if self._rich.has_cursor else None))

    def validation(self, record: Record) -> None:
        """A validation's record."""
        self.print(self._format(record), "bold green")


def progress_reporter(label: str) -> Report:
    """`terminal.progress_reporter` in process 0, and nothing in the others."""
    return (
        (lambda done, total, note="": None)
        if processes.index()
        else terminal.progress_reporter(label)
    )
