"""What a person sees of a run on the console: one line a step, a live one on a terminal, plain ones otherwise."""

import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TextIO

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from sngpt_jax import processes
from sngpt_jax.metrics import Record

WIDTH = 120  # columns that no line passes where there is no terminal
BAR_WIDTH = 16


def format_duration(seconds: float) -> str:
    """`0.4s`, `42s`, `3m12s`, `2h05m`, `3d04h`: two units at most."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


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


def format_step(record: Mapping[str, Any], total_steps: int, width: int | None = None) -> str:
    """`step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.04 │ 123.4 ms │ 66,400 tok/s │ mfu 41.2% │ eta 3m12s`.

    A record with validation numbers begins with `val` instead. What a record lacks is left out, and what matters least until
    the line fits `width` columns, if it can; `eta` is in seconds.
    """
    digits = max(5, len(str(total_steps)))
    head = "val " if any(name.startswith("val_") for name in record) else "step"
    step = record["step"]
    place = f"{head} {step:0{digits}d}/{total_steps:0{digits}d}"
    percent = f" ({step / total_steps:5.1%})"
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
    """What a person sees of a run, on stdout: on a terminal colours and a live last line, otherwise plain lines.

    Of the steps it prints the first ten and the last, and between them a line about every hundredth of the time passed, 2 to
    30 seconds; the live line shows every step. Validations and headers are always printed.
    """

    def __init__(
        self, total_steps: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._total = total_steps
        self._clock = clock
        self._rich = rich.console.Console(file=stream or sys.stdout, highlight=False)
        if not self._rich.is_terminal:
            self._rich.width = WIDTH
        self._start = self._next = clock()
        self._printed = 0
        self._latest: Record | None = None
        self._latest_is_printed = True
        self._live: rich.live.Live | None = None

    def __enter__(self) -> "Console":
        if self._rich.is_terminal and processes.index() == 0:
            self._live = rich.live.Live(
                get_renderable=self._status, console=self._rich, refresh_per_second=4, transient=True, auto_refresh=True
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self.flush()

    def _status(self) -> rich.console.RenderableType:
        """The live line; called four times a second by rich's own thread, so that a step costs only keeping its record."""
        if self._latest is None:
            return rich.text.Text("starting …", style="dim")
        record, columns = self._latest, self._rich.width
        text = rich.text.Text(format_step(record, self._total, columns), no_wrap=True, overflow="ellipsis")
        if len(format_step(record, self._total)) + BAR_WIDTH + 1 > columns:
            return text
        line = rich.table.Table.grid(padding=(0, 1))
        line.add_row(rich.progress_bar.ProgressBar(self._total, float(record["step"]), width=BAR_WIDTH), text)
        return line

    def print(self, text: str, style: str = "") -> None:
        """Text as it is; where there is no terminal its lines are cut at the width."""
        if processes.index() == 0:
            if not self._rich.is_terminal:
                text = "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in text.split("\n"))
            self._rich.print(rich.text.Text(text, style=style), soft_wrap=True)
            self._rich.file.flush()

    def header(self, title: str, pairs: Iterable[tuple[str, str]]) -> None:
        """A title and a (name, value) a line: the quantities that a recipe comes to."""
        rows = list(pairs)
        width = max((len(name) for name, _ in rows), default=0)
        self.print(title, "bold")
        for name, value in rows:
            for line in textwrap.wrap(value, WIDTH - width - 4) or [""]:
                self.print(f"  {name:<{width}}  {line}")
                name = ""

    def step(self, record: Record) -> None:
        """A training step's record: shown live, and printed when its turn has come."""
        self._latest, self._latest_is_printed = record, False
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
        self.print(format_step(record, self._total))

    def validation(self, record: Record) -> None:
        """A validation's record."""
        self.print(format_step(record, self._total), "bold green")


def progress_reporter(
    label: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
) -> Callable[[int, int], None]:
    """A function of (done, total) that says on stderr how far something is, once it takes more than two seconds.

    On a terminal it rewrites one line, otherwise it writes one every five seconds. Process 0 alone says it.
    """
    out = stream or sys.stderr
    live = out.isatty()
    start = clock()
    due, shown = start + 2.0, False

    def report(done: int, total: int) -> None:
        nonlocal due, shown
        now = clock()
        if processes.index() or (now < due and not (shown and done == total)):
            return
        due, shown = now + (0.2 if live else 5.0), True
        left = f", {format_duration((now - start) / done * (total - done))} left" if 0 < done < total else ""
        line = f"{label}: {done:,}/{total:,} ({done / total:.1%}), {format_duration(now - start)}{left}"
        out.write(f"\r\x1b[K{line}" + ("\n" if done == total else "") if live else f"{line}\n")
        out.flush()

    return report
