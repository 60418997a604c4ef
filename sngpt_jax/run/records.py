"""The records of saved steps: what makes a checkpoint trusted.

For each saved step a run's `checkpoints/` holds the folder `STEP`, written by orbax, and its record
`STEP.json`. The record has the SHA-256 of every file of the folder, because orbax loads a flipped
byte without an error. It is written last, atomically: a folder without one is an unfinished save.
"""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256, inside


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is damaged or missing, or does not fit the state."""


def check_path(directory: Path) -> None:
    """Raises `UserError` for a path under which orbax cannot write or read checkpoints."""
    path = f"{directory.absolute()}/"
    wrong = re.search(r"[\[\]\\\ud800-\udfff]|:/", path)
    if wrong:
        what = "a name that is not UTF-8" if "\ud800" <= wrong[0] <= "\udfff" else repr(wrong[0])
        raise UserError(
            f"{path}: checkpoints cannot lie under a path with {what}; choose another --run-dir, or"
            " rename the folder"
        )


@dataclass(frozen=True)
class SaveRecord:
    """What is kept beside the arrays of a step."""

    step: int
    value: float | None  # by which the best step is known; lower is better
    extra: dict[str, Any]
    leaves: dict[str, str]  # path in the tree -> dtype[shape]
    files: dict[str, str]  # path in the step's folder -> SHA-256


@dataclass(frozen=True)
class _Hashed:
    record: dict[str, Any]
    sha256: str  # of the record's JSON


def step_folder(directory: Path, step: int) -> Path:
    """The folder in `directory` where orbax keeps the arrays of `step`."""
    return directory / f"{step:08d}"


def record_path(directory: Path, step: int) -> Path:
    """The file of the record of `step`."""
    return directory / f"{step:08d}.json"


def record_text(record: SaveRecord) -> str:
    """The record as JSON, with a hash of itself. Raises `ValueError` or `TypeError` for values that
    JSON cannot hold.
    """
    body = json.dumps(asdict(record), sort_keys=True, allow_nan=False)
    return f'{{"record": {body}, "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def read_record(directory: Path, step: int) -> SaveRecord:
    """The record of `step`. Raises `CheckpointError` if it is missing or damaged."""
    path = record_path(directory, step)
    if not path.exists():
        folder = step_folder(directory, step)
        raise CheckpointError(f"{folder}: unfinished, it has no record {path.name}")
    values = typed_json.read(path, CheckpointError)
    stored = typed_json.parse(_Hashed, values, str(path), CheckpointError)
    body = json.dumps(stored.record, sort_keys=True).encode()
    if hashlib.sha256(body).hexdigest() != stored.sha256:
        raise CheckpointError(f"{path}: the record is damaged: its SHA-256 differs")
    record = typed_json.parse(SaveRecord, stored.record, f"{path}: record", CheckpointError)
    if record.step != step:
        raise CheckpointError(f"{path}: the record of step {record.step}; rename it back")
    return record


@contextlib.contextmanager
def reading(directory: Path, step: int) -> Iterator[None]:
    """Inside the context the training that writes `directory` does not delete `step`, where the
    file system has locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # the record is missing, or there are no locks
            record = stack.enter_context(record_path(directory, step).open("rb"))
            fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_read(directory: Path, step: int) -> bool:
    """Whether a process is `reading` the step."""
    try:
        # writable, because NFS refuses an exclusive lock of a file that is open for reading only
        with record_path(directory, step).open("r+b") as record:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def hash_files(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of `folder`, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {x.relative_to(folder).as_posix(): file_sha256(x, CheckpointError) for x in files}


def verified_record(directory: Path, step: int) -> SaveRecord:
    """The record of `step`. Raises `CheckpointError` if a file that it names is not as written."""
    record, folder = read_record(directory, step), step_folder(directory, step)
    for name, expected in record.files.items():
        found = file_sha256(inside(folder, name, CheckpointError), CheckpointError)
        if found != expected:
            raise CheckpointError(
                f"{folder}: {name} is damaged: SHA-256 {found[:12]}…, recorded {expected[:12]}…"
            )
    return record


def is_whole(directory: Path, step: int) -> bool:
    """Whether `verified_record` finds nothing wrong."""
    try:
        verified_record(directory, step)
    except CheckpointError:
        return False
    return True


def steps_on_disk(directory: Path) -> list[int]:
    """Steps with a folder or a record, finished or not, ascending."""
    names = {path.name.removesuffix(".json") for path in directory.glob("*")}
    return sorted(int(name) for name in names if name.isdecimal())


def finished(directory: Path) -> Iterator[SaveRecord]:
    """The records of finished saves, by step; `restore` warns of those that cannot be read."""
    for step in steps_on_disk(directory):
        try:
            yield read_record(directory, step)
        except CheckpointError:
            continue


def best(records: Iterable[SaveRecord]) -> int | None:
    """The earliest step with the lowest validation value; None if none has a value."""
    scored = [(record.value, record.step) for record in records if record.value is not None]
    return min(scored)[1] if scored else None
