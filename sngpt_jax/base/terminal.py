"""What a person sees of a command: its log, its progress, its result and the next commands.

The log and progress go to stderr, results to stdout. `--quiet` raises the log's level above INFO,
which hides progress too. Only terminals get colours, bars and boxes.
"""

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TextIO

import rich.console
import rich.panel
import rich.progress
import rich.table
import rich.text

logger = logging.getLogger("sngpt_jax")

BAR_WIDTH = 16
# Seconds before the first report, between plain lines, and between drawings of a live line.
FIRST_REPORT, NEXT_REPORT, REDRAW = 2.0, 5.0, 0.2


def format_duration(seconds: float) -> str:
    """`0.4s`, `42s`, `3m12s`, `2h05m`, `3d04h`: two units at most."""
    if seconds < 59.5:
        return f"{seconds:.{int(seconds < 9.95)}f}s"
    for unit, per, limit, letters in ((1, 60, 60, "ms"), (60, 60, 24, "hm")):
        large, small = divmod(round(seconds / unit), per)
        if large < limit:
            return f"{large}{letters[0]}{small:02d}{letters[1]}"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days}d{hours:02d}h"


class TerminalConsole(rich.console.Console):
    """rich's console on a stream. It breaks no lines, and has colours only on a terminal.

    `has_cursor` is false for a file, a pipe, and a terminal that cannot redraw a line (TERM=dumb).
    Output is dropped once the reader of a pipe is gone, where rich would end the program.
    """

    def __init__(self, stream: TextIO | None) -> None:
        # a standard stream is None where it was closed before Python began
        file = stream or open(os.devnull, "w")  # noqa: SIM115
        super().__init__(
            file=file, force_terminal=file.isatty(), highlight=False, markup=False, soft_wrap=True
        )
        self.has_cursor = file.isatty() and not self.is_dumb_terminal

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# ---------------------------------------- progress


class Report(Protocol):
    """Shows that `done` of `total` (0: unknown) is done; `note` replaces the two numbers."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


def progress_text(task: rich.progress.Task) -> str:
    """`score: 16.0%, 10s left, 16/100 in 2.0s`, with what matters least at the end."""
    parts, count = [], f"{task.completed:,}"
    if task.total:
        parts.append(f"{task.percentage / 100:.1%}")
        count += f"/{task.total:,}"
    if task.remaining and task.speed:
        parts.append(f"{format_duration(task.remaining / task.speed)} left")
    parts.append(f"{task.fields['note'] or count} in {format_duration(task.elapsed or 0.0)}")
    return f"{task.description}: {', '.join(parts)}"


class _TextColumn(rich.progress.ProgressColumn):
    def __init__(self, text: Callable[[rich.progress.Task], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(self._text(task), no_wrap=True, overflow="ellipsis")


def live_lines(
    console: TerminalConsole,
    text: Callable[[rich.progress.Task], str],
    clock: Callable[[], float],
    *,
    bar_from: int,
    auto_refresh: bool,
) -> rich.progress.Progress:
    """rich's display of tasks: a line per task with `text`, and a bar from `bar_from` columns on.
    Other output appears above these lines.
    """
    bar = rich.progress.BarColumn(BAR_WIDTH, complete_style="cyan")
    return rich.progress.Progress(
        *([bar] if console.width >= bar_from else []),
        _TextColumn(text),
        console=console,
        auto_refresh=auto_refresh,
        refresh_per_second=4,
        speed_estimate_period=math.inf,
        get_time=clock,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
    )


_shown: rich.progress.Progress | None = None  # the unfinished progress on the terminal


def clear() -> None:
    """Removes unfinished progress from the terminal, and shows the cursor again."""
    global _shown
    if _shown:
        _shown.live.transient = True
        _shown.stop()
        _shown = None


def _draw(progress: rich.progress.Progress) -> None:
    global _shown
    if _shown is not progress:
        clear()
        progress.start()
        _shown = progress
    progress.refresh()
    if progress.finished:
        progress.stop()
        _shown = None


def progress_reporter(
    label: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.perf_counter
) -> Report:
    """A function that shows progress once the work takes more than two seconds: on a terminal as a
    live line, elsewhere by a line every five seconds. What the first report finds done does not
    count for the speed.
    """
    console = TerminalConsole(stream or sys.stderr)
    progress = live_lines(console, progress_text, clock, bar_from=60, auto_refresh=False)
    progress.add_task(label, total=None, note="")
    (task,) = progress.tasks
    due, shown = clock() + FIRST_REPORT, False

    def report(done: float, total: float, note: str = "") -> None:
        nonlocal due, shown
        progress.update(task.id, completed=done, total=total or None, note=note)
        now = clock()
        if not logger.isEnabledFor(logging.INFO) or (now < due and not (shown and task.finished)):
            return
        due, shown = now + (REDRAW if console.has_cursor else NEXT_REPORT), True
        with contextlib.suppress(OSError):  # a closed terminal or a full disk: the work goes on
            if console.has_cursor:
                _draw(progress)
            else:
                console.print(progress_text(task))

    return report


# ---------------------------------------- the log


class LogHandler(logging.Handler):
    """Writes to the sys.stderr of the moment, which may be rich's: above the live lines."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(self.format(record), file=sys.stderr, flush=True)


# ---------------------------------------- results

Rows = Sequence[tuple[str, str]]


def aligned(rows: Rows) -> Iterator[str]:
    """A line per (name, value), with the values in one column."""
    width = max((len(name) for name, _ in rows), default=0)
    return (f"  {name:<{width}}  {value}" for name, value in rows)


def show_result(
    title: str, rows: Rows, following: Sequence[str] = (), *, console: TerminalConsole | None = None
) -> None:
    """Prints a command's result on stdout: a panel on a terminal, plain lines elsewhere and under
    `--quiet`. Logs the commands to type next, `following`.
    """
    clear()
    console = console or TerminalConsole(sys.stdout)
    if console.has_cursor and logger.isEnabledFor(logging.INFO):
        grid = rich.table.Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(*row)
        panel = rich.panel.Panel.fit(grid, title=title, title_align="left", border_style="green")
        console.print(panel, soft_wrap=False)
    else:
        print(title, *aligned(rows), sep="\n", file=console.file)
    console.file.flush()
    for command in following:
        logger.info("next: %s", command)
