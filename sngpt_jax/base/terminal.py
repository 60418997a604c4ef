"""What a person sees of a command beside its log: how far it is, what came out, and what to type
next.

Progress goes to stderr at the log's level INFO: where `--quiet` has raised that level, nothing is
said. Results go to stdout. Colours, bars and boxes are for terminals alone. Nothing here imports
jax.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TextIO

import rich.console
import rich.panel
import rich.progress_bar
import rich.segment
import rich.table
import rich.text

logger = logging.getLogger("sngpt_jax")

BAR_WIDTH = 16
# seconds: before a word is said, between lines of a log, between drawings
FIRST_REPORT, NEXT_REPORT, REDRAW = 2.0, 5.0, 0.2


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


class TerminalConsole(rich.console.Console):
    """rich's console on a stream, breaking no lines: colours, and what a terminal alone can show,
    where that is a terminal.

    `has_cursor` is false of a file, of a pipe and of a terminal that cannot go back in a line
    (TERM=dumb). Once the reader of a pipe is gone nothing more is written; rich would end the
    program.
    """

    def __init__(self, stream: TextIO | None, *, width: int | None = None) -> None:
        file = stream or open(os.devnull, "w")  # noqa: SIM115 - a stream that was closed before Python began
        super().__init__(
            file=file,
            highlight=False,
            markup=False,
            soft_wrap=True,
            force_terminal=file.isatty(),
            width=width,
        )
        self.has_cursor = file.isatty() and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# ---------------------------------------------------------------------------------------------- progress


class Report(Protocol):
    """Says that `done` of `total` is done (a `total` of 0 is not known); `note` stands in the
    place of the two numbers.
    """

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


class Progress:
    """How far one piece of work is, as text. What the first report finds done has no part in the
    speed that follows.
    """

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self.label, self._clock = label, clock
        self.start = clock()
        self.share = 0.0
        self._first: tuple[float, float] | None = None  # time and what was done then
        self._done, self._total, self._note = 0.0, 0.0, ""

    def reach(self, done: float, total: float, note: str) -> None:
        """Takes a report in."""
        self._first = self._first or (self._clock(), done)
        self._done, self._total, self._note = done, total, note
        self.share = min(done / total, 1.0) if total else 0.0

    def parts(self) -> dict[str, str]:
        """What there is to say: `count`, `share`, `elapsed`, `left`, the last of which ends with
        the work.
        """
        now = self._clock()
        begun, already = (
            self._first if self._first and self._first[1] < self._done else (self.start, 0.0)
        )
        parts = {"count": self._note or f"{self._done:,}/{self._total:,}"}
        if self._total:
            parts["share"] = f"({self.share:.1%})"
        parts["elapsed"] = format_duration(now - self.start)
        if 0 < self._done < self._total:
            left = (now - begun) / (self._done - already) * (self._total - self._done)
            parts["left"] = f"{format_duration(left)} left"
        return parts

    def line(self) -> str:
        """`score: 16/100 (16.0%), 2.0s, 10s left`."""
        return f"{self.label}: {_joined(self.parts())}"

    def drawing(self, width: int) -> rich.console.RenderableType:
        """The same with a bar, in one line of `width` columns; what does not fit is left out, the
        bar first.
        """
        parts = self.parts()
        text = rich.text.Text(no_wrap=True, overflow="ellipsis")
        for dispensable in ("", "bar", "count", "elapsed", "share"):
            parts.pop(dispensable, None)
            has_bar = "share" in parts and dispensable == ""
            text.plain = _joined(parts) if has_bar else f"{self.label}: {_joined(parts)}"
            if text.cell_len + has_bar * (len(self.label) + BAR_WIDTH + 2) <= width:
                break
        if not has_bar:
            return text
        line = rich.table.Table.grid(padding=(0, 1))
        line.add_row(
            self.label,
            rich.progress_bar.ProgressBar(1.0, self.share, width=BAR_WIDTH, complete_style="cyan"),
            text,
        )
        return line


def _joined(parts: Mapping[str, str]) -> str:
    counted = " ".join(parts[name] for name in ("count", "share") if name in parts)
    return ", ".join(filter(None, (counted, parts.get("elapsed"), parts.get("left"))))


_drawn: TerminalConsole | None = None  # where a line stands that is still to be drawn anew


def clear() -> None:
    """Takes the drawn line away, if there is one: before anything else is written to the terminal."""
    global _drawn
    if _drawn:
        _drawn.file.write("\r\x1b[K")
        _drawn.file.flush()
        _drawn = None


def _draw(console: TerminalConsole, progress: Progress, ended: bool) -> None:
    global _drawn
    clear()
    width = max(console.width - 1, 1)  # in the last column some terminals go on to the next line
    line, *_ = console.render_lines(
        progress.drawing(width), console.options.update(width=width), pad=False
    )
    console.print(
        rich.segment.Segments([*line, rich.segment.Segment.line()] if ended else line), end=""
    )
    _drawn = None if ended else console


def progress_reporter(
    label: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
) -> Report:
    """A function of (done, total) that says on stderr how far something is, once it takes more
    than two seconds.

    On a terminal it draws one line anew, otherwise it writes one every five seconds. Nothing under
    `--quiet`.
    """
    console = TerminalConsole(stream or sys.stderr)
    progress = Progress(label, clock)
    due, shown = progress.start + FIRST_REPORT, False

    def report(done: float, total: float, note: str = "") -> None:
        nonlocal due, shown
        now, ended = clock(), bool(total) and done == total
        progress.reach(done, total, note)
        if not logger.isEnabledFor(logging.INFO) or (now < due and not (shown and ended)):
            return
        due, shown = now + (REDRAW if console.has_cursor else NEXT_REPORT), True
        with contextlib.suppress(OSError):  # a closed terminal or a full disk: the work goes on
            if console.has_cursor:
                _draw(console, progress, ended)
            else:
                console.print(progress.line())

    return report


# ---------------------------------------------------------------------------------------------- the log


class LogHandler(logging.Handler):
    """Log lines as they are, to whatever sys.stderr is at that moment: beside a live line that is
    what keeps the two apart.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            clear()
            print(self.format(record), file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- results

Rows = Sequence[tuple[str, str]]


def aligned(rows: Rows) -> Iterator[str]:
    """A line for each (name, value), the values below each other. No line is cut or wrapped, so
    that paths stay whole.
    """
    width = max((len(name) for name, _ in rows), default=0)
    return (f"  {name:<{width}}  {value}" for name, value in rows)


def show_result(
    title: str, rows: Rows, following: Sequence[str] = (), *, console: TerminalConsole | None = None
) -> None:
    """A command's result on stdout: a panel on a terminal, plain lines elsewhere and under
    `--quiet`.

    `following` are commands to type next, each in a line of its own on stderr, as a log's; without
    them under `--quiet`.
    """
    clear()
    console = console or TerminalConsole(sys.stdout)
    if console.has_cursor and logger.isEnabledFor(logging.INFO):
        grid = rich.table.Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(*row)
        console.print(
            rich.panel.Panel(
                grid, title=title, title_align="left", expand=False, border_style="green"
            ),
            soft_wrap=False,
        )
    else:
        for line in (title, *aligned(rows)):
            print(line, file=console.file)
    console.file.flush()
    for command in following:
        logger.info("next: %s", command)
