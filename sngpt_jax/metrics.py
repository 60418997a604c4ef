"""What a run says: `metrics.jsonl` and TensorBoard for later, and one line a step on the console for now.

A record is a flat mapping. `step` counts the optimizer steps done; `train_loss`, `lr`, `grad_norm`, `tokens`, `step_ms`,
`tok_per_s` and `mfu` (a fraction) are a training step's, names that begin with `val_` a validation's.
"""

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
import rich.box
import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from sngpt_jax.cli import UserError, write_text_atomic

Record = Mapping[str, float | int | str]

WIDTH = 120  # columns that no line passes where there is no terminal


# ---------------------------------------------------------------------------------------------- files


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line torn by a kill is left out; any other bad line is a `UserError`."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a metrics record (a JSON object with a number as its step)") from None
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    """One JSON object. Floats are written so that they read back bit for bit; NaN and infinities, unknown to JSON, as null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps({"step": finite["step"], **finite}, allow_nan=False) + "\n"


def _tag(name: str) -> str:
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name.removeprefix('train_')}"


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl` and draws the same numbers in its `tensorboard/`. Process 0 alone writes."""

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        """Goes on after `resume_step`, or anew where it is None: later records, of steps that are done again, are dropped."""
        self._path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if jax.process_index() != 0:
            return
        last = -1 if resume_step is None else resume_step
        kept = [record for record in read_metrics(self._path) if record["step"] <= last] if self._path.exists() else []
        try:
            write_text_atomic(self._path, "".join(map(_line, kept)))
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            # A longer queue than the default of 10, which holds up the training loop whenever the writing thread is behind.
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last + 1, max_queue=1000, flush_secs=30)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: metrics cannot be written: {error}; free or choose another --run-dir and resume")

    def write(self, record: Record) -> None:
        """Appends one record, which has a `step`, and flushes it. Raises `UserError` where the disk is full."""
        if self._file is None or self._board is None:
            return
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        scalars = {_tag(name): v for name, v in record.items() if name != "step" and not isinstance(v, str)}
        # One event for all: add_scalar, one by one, would cost the training loop ten times as much.
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        self._board.file_writer.add_summary(summary, record["step"])

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# ---------------------------------------------------------------------------------------------- speed

# Dense bfloat16 tensor-core peaks from NVIDIA's data sheets (half of what they print "with sparsity"), by part of the device's
# name; the first that fits counts.
_PEAKS = (
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100 80GB HBM3", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one device by its `jax.Device.device_kind`; None where not known, as for a slice of a GPU."""
    if "MIG" in device_kind:
        return None
    return next((peak for name, peak in _PEAKS if name in device_kind), None)


@dataclass
class StepMeter:
    """Turns the times at which steps end into step time, throughput and utilization."""

    tokens_per_step: int
    flops_per_token: float  # forward and backward
    peak_flops: float | None  # of all devices together; None: no utilization is given
    clock: Callable[[], float] = time.perf_counter  # seconds
    _mark: tuple[int, float] | None = field(default=None, init=False)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32), init=False)  # a step, lately

    def start(self, step: int) -> None:
        """Sets the clock as of `step` done: before the first step, and after anything that is not training time."""
        self._mark = (step, self.clock())

    def stop(self, step: int) -> dict[str, float]:
        """`step_ms`, `tok_per_s` and, where the peak is known, `mfu` of the steps since the last `start` or `stop`."""
        if self._mark is None or step <= self._mark[0]:
            raise ValueError(f"stop({step}) needs a start of an earlier step")
        now = self.clock()
        seconds = max(now - self._mark[1], 1e-9) / (step - self._mark[0])
        self._mark = (step, now)
        self._seconds.append(seconds)
        rate = self.tokens_per_step / seconds
        result = {"step_ms": seconds * 1e3, "tok_per_s": rate}
        return result if self.peak_flops is None else result | {"mfu": rate * self.flops_per_token / self.peak_flops}

    def eta(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps take at the median of the last 32 step times, which one slow step does not move."""
        return statistics.median(self._seconds) * steps_left if self._seconds else None


# ---------------------------------------------------------------------------------------------- text


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
    ("val_best", lambda x: f"best {x:.4f}"),
    ("val_seconds", lambda x: f"{x:.1f} s"),
    ("lr", lambda x: f"lr {x:.4f}"),
    ("grad_norm", lambda x: f"grad {x:.3g}"),
    ("step_ms", lambda x: f"{x:.1f} ms" if x < 999.95 else f"{x / 1e3:.2f} s"),
    ("tok_per_s", lambda x: f"{x:,.0f} tok/s"),
    ("mfu", lambda x: f"mfu {x:.1%}"),
    ("eta", lambda x: f"eta {format_duration(x)}"),
)


def format_step(record: Mapping[str, Any], total_steps: int) -> str:
    """`step 00120/02000 ( 6.0%) │ loss 3.2145 │ lr 0.0400 │ 123.4 ms │ 66,400 tok/s │ mfu 41.2% │ eta 3m12s`.

    A record with validation numbers begins with `val` instead. What a record lacks is left out; `eta` is in seconds.
    """
    digits = max(5, len(str(total_steps)))
    head = "val " if any(name.startswith("val_") for name in record) else "step"
    step = record["step"]
    place = f"{head} {step:0{digits}d}/{total_steps:0{digits}d} ({step / total_steps:5.1%})"
    return " │ ".join([place, *(show(record[name]) for name, show in _COLUMNS if record.get(name) is not None)])


# ---------------------------------------------------------------------------------------------- console


class Console:
    """What a person sees of a run, on stdout: on a terminal colours and a live last line, otherwise plain lines.

    Of the steps it prints the first ten and the last, and between them a line about every hundredth of the time passed, 2 to
    30 seconds; the live line shows every step. Validation, headers, tables and warnings are always printed.
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
        if self._rich.is_terminal and jax.process_index() == 0:
            self._live = rich.live.Live(
                get_renderable=self._status, console=self._rich, refresh_per_second=4, transient=True, auto_refresh=True
            )
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._latest is not None and not self._latest_is_printed:
            self._print_step(self._latest)

    def _status(self) -> rich.console.RenderableType:
        """The live line; called four times a second by rich's own thread, so that a step costs only keeping its record."""
        if self._latest is None:
            return rich.text.Text("starting …", style="dim")
        line = rich.table.Table.grid(padding=(0, 1))
        bar = rich.progress_bar.ProgressBar(total=self._total, completed=float(self._latest["step"]), width=16)
        line.add_row(bar, rich.text.Text(format_step(self._latest, self._total), no_wrap=True, overflow="ellipsis"))
        return line

    def print(self, text: str, style: str = "") -> None:
        """Text as it is; where there is no terminal its lines are cut at the width."""
        if jax.process_index() == 0:
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
            self.print(f"  {name:<{width}}  {value}")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose columns after the first are aligned to the right."""
        table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(rich.text.Text, row))
        if jax.process_index() == 0:
            self._rich.print(table)

    def warning(self, text: str) -> None:
        """One line that begins with `warning:`."""
        self.print(f"warning: {text}", "yellow")

    def step(self, record: Record) -> None:
        """A training step's record: shown live, and printed when its turn has come."""
        self._latest, self._latest_is_printed = record, False
        now = self._clock()
        if self._printed < 10 or now >= self._next or record["step"] == self._total:
            self._next = now + min(max((now - self._start) / 100, 2.0), 30.0)
            self._print_step(record)

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

    On a terminal it rewrites one line, otherwise it writes one every five seconds.
    """
    out = stream or sys.stderr
    live = out.isatty()
    start = clock()
    due, shown = start + 2.0, False

    def report(done: int, total: int) -> None:
        nonlocal due, shown
        now = clock()
        if now < due and not (shown and done == total):
            return
        due, shown = now + (0.2 if live else 5.0), True
        left = f", {format_duration((now - start) / done * (total - done))} left" if 0 < done < total else ""
        line = f"{label}: {done:,}/{total:,} ({done / total:.1%}), {format_duration(now - start)}{left}"
        out.write(f"\r\x1b[K{line}" + ("\n" if done == total else "") if live else f"{line}\n")
        out.flush()

    return report
