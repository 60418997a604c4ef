"""What a run measures of itself: `metrics.jsonl` and TensorBoard, and the speed of its steps.

A record is a flat mapping. `step` counts the optimizer steps done; `train_loss`, `lr`,
`grad_norm`, `tokens`, `step_ms`, `tok_per_s` and `mfu` (a fraction) are a training step's, names
that begin with `val_` a validation's. A name with a slash says itself where TensorBoard groups it.
"""

import contextlib
import json
import logging
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.cluster import processes

Record = Mapping[str, float | int | str]

MAX_BYTES = 2**30  # of a metrics.jsonl: three million steps, each with its line

logger = logging.getLogger("sngpt_jax")


# ---------------------------------------------------------------------------------------------- files


def read_metrics(path: Path, skipped: list[int] | None = None) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line torn by a kill is left out.

    Any other bad line is a `UserError`; or, where `skipped` is given, is left out too and its
    number, from 1, put there.
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
                raise UserError(
                    f"{path}:{number}: not a metrics record (a JSON object with a number as its"
                    " step)"
                ) from None
            skipped.append(number)
            continue
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    """One JSON object. Floats are written so that they read back bit for bit; NaN and infinities,
    unknown to JSON, as null.
    """
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
    return (
        f"val/{name.removeprefix('val_')}"
        if name.startswith("val_")
        else f"train/{name.removeprefix('train_')}"
    )


class _Board:
    """A TensorBoard event file, buffered. It only repeats metrics.jsonl, so a write that fails
    ends it with a warning.

    tensorboardX's own writer hands events to a thread, which dies of a full disk with a traceback;
    the queue to it, once full, then holds up the training for ever.
    """

    _FLUSH_SECONDS = 30.0

    def __init__(self, directory: Path, purge_step: int) -> None:
        """Makes the file; TensorBoard drops earlier files' events from `purge_step` on. Raises
        `OSError`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file: BinaryIO | None = open(directory / name, "wb")  # noqa: SIM115 - closed by close()
        self._flushed = time.monotonic()
        self._append(Event(file_version="brain.Event:2"))
        self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        try:  # TFRecord's frame
            for piece in (length, _crc(length), content, _crc(content)):
                self._file.write(piece)
            if time.monotonic() - self._flushed > self._FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.warning(
            f"{self._directory}: no longer written: {error.strerror}; metrics.jsonl has the same"
            " numbers"
        )
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # what is buffered cannot be written either
            if file is not None:
                file.close()

    def close(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
                self._file.close()
        except OSError as error:
            self._give_up(error)


def _crc(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl` and draws the same numbers in its `tensorboard/`.
    Process 0 alone writes.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        """Goes on after `resume_step`, or anew where it is None: later records, of steps that are
        done again, are dropped.
        """
        self._path = run_dir / "metrics.jsonl"
        self._file: TextIO | None = None
        self._board: _Board | None = None
        if processes.index():
            return
        last = -1 if resume_step is None else resume_step
        kept = (
            [record for record in read_metrics(self._path) if record["step"] <= last]
            if self._path.exists()
            else []
        )
        try:
            write_text_atomic(self._path, "".join(map(_line, kept)))
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            self._board = _Board(run_dir / "tensorboard", purge_step=last + 1)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path}: metrics cannot be written: {error.strerror}; free space and start"
            " again: the run goes on"
        )

    def write(self, record: Record) -> None:
        """Appends one record, which has a `step`, and flushes it. Raises `UserError` where the
        disk is full.
        """
        if self._file is None or self._board is None:
            return
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        scalars = {
            _tag(name): v for name, v in record.items() if name != "step" and not isinstance(v, str)
        }
        self._board.write(int(record["step"]), scalars)

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None and self._board is not None:
            with contextlib.suppress(OSError):  # of a record whose `write` has raised it
                self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
