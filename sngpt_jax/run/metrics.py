"""The metrics of a run: `metrics.jsonl`, and the same numbers for TensorBoard.

A record is a flat mapping. `step` counts the finished optimizer steps. Names that begin with
`val_` belong to a validation. A slash in a name sets its TensorBoard group.
"""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.cluster import processes

Record = Mapping[str, float | int | str]

MAX_BYTES = 2**30  # of a metrics.jsonl: three million lines

logger = logging.getLogger("sngpt_jax")


def read_metrics(path: Path, skipped: list[int] | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line that a kill cut short.

    Any other bad line is a `UserError`. With a list for `skipped`, it is left out instead, and its
    number, from 1, appended there.
    """
    lines = untrusted.read_bytes(path, MAX_BYTES, UserError).splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        record = None
        with contextlib.suppress(ValueError):
            record = typed_json.loads(line)
        if isinstance(record, dict) and type(record.get("step")) in (int, float):
            records.append(record)
        elif number == len(lines):
            break
        elif skipped is None:
            raise UserError(f"{path}:{number}: not a metrics record (an object with a step)")
        else:
            skipped.append(number)
    return records


def _line(record: Mapping[str, Any]) -> str:
    """One JSON object. Floats read back bit for bit. NaN and infinities become null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps({"step": finite["step"], **finite}, allow_nan=False) + "\n"


def _tag(name: str) -> str:
    if "/" in name:
        return name
    average, is_average, what = name.partition("_val_")
    if is_average:
        return f"val/{average}_{what}"
    group = "val" if name.startswith("val_") else "train"
    return f"{group}/{name.removeprefix(f'{group}_')}"


def _tensorboard() -> tuple[Any, Any, Any]:
    """tensorboardX's file writer and two messages. Its import of torch would take seconds."""
    hidden = sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
    finally:
        if hidden is None:
            del sys.modules["torch"]
    return EventsWriter, event_pb2, summary_pb2


class _Board:
    """A TensorBoard event file. A failed write ends it with a warning.

    tensorboardX's `SummaryWriter` writes in a thread, and blocks the training on a full disk.
    """

    def __init__(self, directory: Path, purge_step: int) -> None:
        """Makes the file. TensorBoard drops events of earlier files from `purge_step` on."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        events_writer, self._events, self._summaries = _tensorboard()
        self._file: Any = events_writer(str(directory / "events"), f".{os.getpid()}")
        self._flushed = time.monotonic()
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._append(step=purge_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        value = self._summaries.Summary.Value
        values = [value(tag=tag, simple_value=number) for tag, number in scalars.items()]
        self._append(step=step, summary=self._summaries.Summary(value=values))

    def _append(self, **content: Any) -> None:
        event = self._events.Event(wall_time=time.time(), **content)
        self._try(lambda: self._file.write_event(event))
        if time.monotonic() - self._flushed > 30.0:
            self._try(lambda: self._file.flush())
            self._flushed = time.monotonic()

    def _try(self, write: Callable[[], object]) -> None:
        if self._file is None:
            return
        try:
            write()
        except OSError as error:
            self._file = None
            reason = f"no longer written: {error.strerror}"
            logger.warning(f"{self._directory}: {reason}; metrics.jsonl has the same numbers")

    def close(self) -> None:
        self._try(lambda: self._file.close())


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl` and `tensorboard/`. Only process 0 writes."""

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        """Starts anew, or resumes after `resume_step`: later records are dropped, because their
        steps are done again.
        """
        self._path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None
        self._board: _Board | None = None
        if processes.index():
            return
        last = -1 if resume_step is None else resume_step
        before = read_metrics(self._path) if self._path.exists() else []
        kept = [record for record in before if record["step"] <= last]
        write_text_atomic(self._path, "".join(map(_line, kept)))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._board = _Board(run_dir / "tensorboard", purge_step=last + 1)

    def write(self, record: Record) -> None:
        """Appends one record, which has a `step`, and flushes it."""
        if self._file is None or self._board is None:
            return
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        numbers = {name: value for name, value in record.items() if not isinstance(value, str)}
        step = int(numbers.pop("step"))
        self._board.write(step, {_tag(name): value for name, value in numbers.items()})

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None and self._board is not None:
            with contextlib.suppress(OSError):  # of a record whose `write` has raised it
                self._file.close()
            self._board.close()
