"""What a run measures of itself: `metrics.jsonl` and TensorBoard, and the speed of its steps.

A record is a flat mapping. `step` counts the optimizer steps done; `train_loss`, `lr`, `grad_norm`, `tokens`, `step_ms`,
`tok_per_s` and `mfu` (a fraction) are a training step's, names that begin with `val_` a validation's. A name with a slash says
itself where TensorBoard groups it.
"""

import json
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary

from sngpt_jax import processes, typed_json, untrusted
from sngpt_jax.cli import UserError, write_text_atomic

Record = Mapping[str, float | int | str]

MAX_BYTES = 2**30  # of a metrics.jsonl: three million steps, each with its line


# ---------------------------------------------------------------------------------------------- files


def read_metrics(path: Path, skipped: list[int] | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line torn by a kill is left out.

    Any other bad line is a `UserError`; or, where `skipped` is given, is left out too and its number, from 1, put there.
    """
    lines = untrusted.read_bytes(path, MAX_BYTES, UserError).splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = typed_json.loads(line)
            if not isinstance(record, dict) or type(record.get("step")) not in (int, float):
                raise ValueError("no record")
        except ValueError:
            if number == len(lines):
                break
            if skipped is None:
                raise UserError(f"{path}:{number}: not a metrics record (a JSON object with a number as its step)") from None
            skipped.append(number)
            continue
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    """One JSON object. Floats are written so that they read back bit for bit; NaN and infinities, unknown to JSON, as null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps({"step": finite["step"], **finite}, allow_nan=False) + "\n"


def _tag(name: str) -> str:
    if "/" in name:
        return name
    average, is_average, what = name.partition("_val_")
    if is_average:
        return f"val/{average}_{what}"
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name.removeprefix('train_')}"


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl` and draws the same numbers in its `tensorboard/`. Process 0 alone writes."""

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        """Goes on after `resume_step`, or anew where it is None: later records, of steps that are done again, are dropped."""
        self._path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        if processes.index():
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


def peak_memory(device: jax.Device) -> int:
    """The most bytes that arrays have taken on the device so far; where that is the processor, this process as a whole."""
    stats = device.memory_stats()
    if stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
    _ended: tuple[int, float] | None = field(default=None, init=False)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32), init=False)  # a step, lately

    def start(self, step: int) -> None:
        """Sets the clock as of `step` done: before the first step, and after anything that is not training time."""
        self._mark = (step, self.clock())

    def ended(self, step: int) -> None:
        """Notes that `step` has ended by now, for a `stop` that comes only once more work has been done."""
        self._ended = (step, self.clock())

    def stop(self, step: int) -> dict[str, float]:
        """`step_ms`, `tok_per_s` and, where the peak is known, `mfu` of the steps since the last `start` or `stop`."""
        if self._mark is None or step <= self._mark[0]:
            raise ValueError(f"stop({step}) needs a start of an earlier step")
        now = self._ended[1] if self._ended and self._ended[0] == step else self.clock()
        seconds = max(now - self._mark[1], 1e-9) / (step - self._mark[0])
        self._mark = (step, now)
        self._seconds.append(seconds)
        rate = self.tokens_per_step / seconds
        result = {"step_ms": seconds * 1e3, "tok_per_s": rate}
        return result if self.peak_flops is None else result | {"mfu": rate * self.flops_per_token / self.peak_flops}

    def eta(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` steps take at the median of the last 32 step times, which one slow step does not move."""
        return statistics.median(self._seconds) * steps_left if self._seconds else None
