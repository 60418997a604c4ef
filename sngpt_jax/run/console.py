"""What a person sees of a run on the console: a line per step, and a live one on a terminal."""

import contextlib
import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import rich.progress
import rich.text

from sngpt_jax.base import terminal
from sngpt_jax.base.cli import drop_output
from sngpt_jax.base.terminal import BAR_WIDTH, Report, Rows, TerminalConsole, format_duration
from sngpt_jax.cluster import processes
from sngpt_jax.run.metrics import Record

logger = logging.getLogger("sngpt_jax")

WIDTH = 120  # columns of the longest line where there is no terminal
BAR_FROM = 130  # columns of a terminal that has room for a bar beside the longest line

_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
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

# What a line omits if it is too long for the terminal, first to last.
_DISPENSABLE = ("grad_norm", "lr", "step_ms", "percent", "mfu", "tok_per_s")


def format_step(
    record: Mapping[str, Any],
    total_steps: int,
    width: int | None = None,
    *,
    share: float | None = None,
) -> str:
    """`step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.04 │ 123.4 ms │ 66,400 tok/s │ eta 3m12s`.

    A record with validation numbers begins with `val`. The line omits what the record lacks, and
    then the least important numbers until it fits `width` columns. `share` of the run is done; the
    default follows from the steps.
    """
    step, digits = record["step"], max(5, len(str(total_steps)))
    head = "val " if any(name.startswith("val_") for name in record) else "step"
    place = f"{head} {step:0{digits}d}/{total_steps:0{digits}d}"
    percent = f" ({step / total_steps if share is None else share:5.1%})"
    shown = {name: show(record[name]) for name, show in _COLUMNS if record.get(name) is not None}
    if count := record.get("val_byte_count"):
        shown["val_bpb"] += f" ({count})"
    for name in ("", *_DISPENSABLE):  # whole first
        if name == "percent":
            percent = ""
        shown.pop(name, None)
        line = " │ ".join([place + percent, *shown.values()])
        if width is None or len(line) <= width:
            break
    return line


class Console:
    """Prints a run on stdout: plain lines; a terminal has colours and a live line of every step.

    The first ten steps and the last one are printed. Between them a line appears about every
    hundredth of the time passed, after 2 to 30 seconds. With `quiet` only the result is printed.
    The run continues if stdout can no longer be written.
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
        """The run ends after `max_seconds` of training, whatever its steps; 0: no limit."""
        self._total, self._max_seconds = total_steps, max_seconds
        self.quiet, self._clock = quiet, clock
        self._shown = not quiet and processes.index() == 0
        self._rich = TerminalConsole(stream or sys.stdout)
        if not self._rich.has_cursor:
            self._rich.width = WIDTH
        self._start = self._next = clock()
        self._printed = 0  # steps
        self._latest: Record | None = None
        self._latest_is_printed = True
        self._live: rich.progress.Progress | None = None
        if self._rich.has_cursor and self._shown:
            self._live = terminal.live_lines(
                self._rich, self._live_text, clock, bar_from=BAR_FROM, auto_refresh=True
            )
            self._live.live.transient = True
            self._run = self._live.add_task("", total=1.0, visible=False)

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *error: object) -> None:
        self._end_live()
        self.flush()

    def _end_live(self) -> None:
        if self._live is not None:
            with self._expecting_loss():
                self._live.stop()
            self._live = None

    def _share(self, record: Record) -> float:
        """The share of the run that is done, by its steps or by its clock."""
        share = float(record["step"]) / self._total
        if self._max_seconds:
            timed = record if "elapsed_seconds" in record else self._latest or {}
            share = max(share, float(timed.get("elapsed_seconds") or 0.0) / self._max_seconds)
        return min(share, 1.0)

    def _format(self, record: Record, width: int | None = None) -> str:
        return format_step(record, self._total, width, share=self._share(record))

    def _live_text(self, task: rich.progress.Task) -> str:
        """A live line. rich's thread calls this, so that a step costs little."""
        if task.description:
            return terminal.progress_text(task)
        columns = self._rich.width - (BAR_WIDTH + 1) * (self._rich.width >= BAR_FROM)
        return self._format(self._latest, columns) if self._latest else ""

    def progress(self, label: str) -> Report:
        """A function of (done, total) for work beside the steps, which has its own live line."""
        if self._live is None:
            return progress_reporter(label)
        live = self._live
        live.start()
        task = live.add_task(label, total=None, visible=False, note="")

        def report(done: float, total: float, note: str = "") -> None:
            live.update(task, completed=done, total=total or None, note=note, visible=done != total)

        return report

    def print(self, text: str, style: str = "") -> None:
        """Prints text as it is. Where there is no terminal, its lines are cut at `WIDTH`."""
        if self._shown:
            if not self._rich.has_cursor:
                lines = text.split("\n")
                text = "\n".join(x if len(x) <= WIDTH else f"{x[: WIDTH - 1]}…" for x in lines)
            with self._expecting_loss():
                self._rich.print(rich.text.Text(text, style=style), soft_wrap=True)
                self._rich.file.flush()

    @contextlib.contextmanager
    def _expecting_loss(self) -> Iterator[None]:
        """Gives stdout up if it cannot be written, as on a full disk or a closed terminal."""
        try:
            yield
        except OSError as error:
            if self._rich.file is not sys.stdout:
                raise
            drop_output()
            if not isinstance(error, BrokenPipeError):
                reason = f"cannot be written: {error.strerror}"
                logger.warning(f"stdout: {reason}; the run continues without it")

    def header(self, title: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Prints a title, and a (name, value) per line."""
        rows = list(pairs)
        width = max((len(name) for name, _ in rows), default=0)
        self.print(title, "bold")
        for name, value in rows:
            for line in textwrap.wrap(value, WIDTH - width - 4) or [""]:
                self.print(f"  {name:<{width}}  {line}")
                name = ""

    def result(self, title: str, rows: Rows, following: Sequence[str] = ()) -> None:
        """Shows the run's result and the commands to type next by `terminal.show_result`."""
        if processes.index() == 0:
            self.flush()
            self._end_live()
            with self._expecting_loss():
                terminal.show_result(title, rows, following, console=self._rich)

    def step(self, record: Record) -> None:
        """Shows a training step's record live, and prints it when its turn has come."""
        self._latest, self._latest_is_printed = record, False
        if self._live is not None:
            self._live.update(self._run, completed=self._share(record), visible=True)
            self._live.start()
        now = self._clock()
        if self._printed < 10 or now >= self._next or record["step"] == self._total:
            self._next = now + min(max((now - self._start) / 100, 2.0), 30.0)
            self._print_step(record)

    def flush(self) -> None:
        """Prints the latest step, if it was not printed yet."""
        if self._latest is not None and not self._latest_is_printed:
            self._print_step(self._latest)

    def _print_step(self, record: Record) -> None:
        self._printed += 1
        self._latest_is_printed = True
        self.print(self._format(record, self._rich.width if self._rich.has_cursor else None))

    def validation(self, record: Record) -> None:
        """Prints a validation's record."""
        self.print(self._format(record), "bold green")


def progress_reporter(label: str) -> Report:
    """`terminal.progress_reporter` in process 0; silent in the other processes."""
    if processes.index():
        return lambda done, total, note="": None
    return terminal.progress_reporter(label)
