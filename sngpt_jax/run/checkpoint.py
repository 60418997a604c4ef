"""Checkpoints: orbax writes the arrays, a record beside them says that they are whole, and only
what has a record is trusted.

For each saved step a run's `checkpoints/` holds the folder `STEP` (an orbax checkpoint of the
state's leaves, each under its path in the tree) and the file `STEP.json`, its record: the caller's
extra values, the validation value, each leaf's shape and dtype, and the SHA-256 of every file of
the folder. The record is written, atomically, after the last of those files, so it is the commit:
a folder without one is an unfinished save. The hashes are there because orbax loads a flipped byte
without a word.

Old steps are deleted here and not by orbax's preservation policies, which would delete them once
orbax has finished the new step, before the new step has its record: a kill in between would leave
nothing to trust.
"""

import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.base.untrusted import file_sha256, inside
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.mesh import path_name

logger = logging.getLogger("sngpt_jax")
# orbax's threads log the traceback of a failed write (a full disk, say) once per layer, and then
# raise the same error to us.
logging.getLogger("absl").addFilter(
    lambda record: "_SignalingThread.run() raised" not in str(record.msg)
)

# Seconds after which orbax gives a save up. It measures them by the clock that people set, which
# may jump; a save that waits for a process that is gone is ended by `processes`.
_TIMEOUT = 30 * 86_400


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is damaged, is not there, or does not fit the state
    asked for.
    """


@dataclass(frozen=True)
class Restored:
    """A state read back, with what was saved beside it."""

    step: int
    state: Any  # the tree asked for, with arrays for its leaves, placed by its shardings
    extra: dict[str, Any]  # as given to `save`, through JSON


@dataclass(frozen=True)
class _Record:
    step: int
    value: float | None
    extra: dict[str, Any]
    leaves: dict[str, str]  # path in the tree -> dtype[shape]
    files: dict[str, str]  # path in the step's folder -> SHA-256


@dataclass(frozen=True)
class _Hashed:
    record: dict[str, Any]
    sha256: str  # of the record's JSON


def step_folder(directory: Path, step: int) -> Path:
    """Where in `directory` orbax keeps the arrays of `step`."""
    return directory / f"{step:08d}"


def _record_path(directory: Path, step: int) -> Path:
    return directory / f"{step:08d}.json"


# ---------------------------------------------------------------------------------------------- records


def _record_text(record: _Record) -> str:
    """The record as JSON, with a hash of itself; raises `ValueError` or `TypeError` for extra
    values that JSON cannot hold.
    """
    body = json.dumps(asdict(record), sort_keys=True, allow_nan=False)
    return f'{{"record": {body}, "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"}}\n'


def _read_record(directory: Path, step: int) -> _Record:
    path = _record_path(directory, step)
    if not path.exists():
        raise CheckpointError(
            f"{step_folder(directory, step)}: unfinished, it has no record {path.name}"
        )
    stored = typed_json.parse(
        _Hashed, typed_json.read(path, CheckpointError), str(path), CheckpointError
    )
    body = json.dumps(stored.record, sort_keys=True).encode()
    if hashlib.sha256(body).hexdigest() != stored.sha256:
        raise CheckpointError(f"{path}: the record is damaged: its SHA-256 is another")
    record = typed_json.parse(_Record, stored.record, f"{path}: record", CheckpointError)
    if record.step != step:
        raise CheckpointError(f"{path}: the record of step {record.step}; rename it back")
    return record


def _hash_files(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): file_sha256(p, CheckpointError)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _verified_record(directory: Path, step: int) -> _Record:
    """The record of `step`, once every file that it names has the bytes that were written."""
    record = _read_record(directory, step)
    folder = step_folder(directory, step)
    for name, expected in record.files.items():
        found = file_sha256(inside(folder, name, CheckpointError), CheckpointError)
        if found != expected:
            raise CheckpointError(
                f"{folder}: {name} is damaged: SHA-256 {found[:12]}…, recorded {expected[:12]}…"
            )
    return record


def _is_whole(directory: Path, step: int) -> bool:
    try:
        _verified_record(directory, step)
    except CheckpointError:
        return False
    return True


def _steps_on_disk(directory: Path) -> list[int]:
    """Steps with a folder or a record, finished or not, ascending."""
    names = {path.name.removesuffix(".json") for path in directory.glob("*")}
    return sorted(int(name) for name in names if name.isdecimal())


def _finished(directory: Path) -> Iterator[_Record]:
    for step in _steps_on_disk(directory):
        try:
            yield _read_record(directory, step)
        except CheckpointError:
            continue  # unfinished or damaged; `restore` says so if it comes to it


def _best(records: Iterable[_Record]) -> int | None:
    """The step with the lowest validation value, the earliest of equals; None where none has a
    value.
    """
    scored = [(record.value, record.step) for record in records if record.value is not None]
    return min(scored)[1] if scored else None


# ---------------------------------------------------------------------------------------------- reading


def steps(directory: Path) -> list[int]:
    """The steps whose save finished, ascending. Their bytes are verified only by `restore`."""
    return [record.step for record in _finished(directory)]


def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by their path in the tree, such as `params/blocks/0/w`, and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {path_name(path): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named, structure


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _check_fit(folder: Path, saved: Mapping[str, str], asked: Mapping[str, str]) -> None:
    names = list(asked) + [name for name in saved if name not in asked]
    problems = [
        f"{name[:200] or 'the state'}: saved {saved.get(name, 'nothing')[:100]}, expected"
        f" {asked.get(name, 'nothing')}"
        for name in names
        if saved.get(name) != asked.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{folder}: does not fit the state asked for: {'; '.join(problems[:3])}{more}"
        )


def _load(directory: Path, record: _Record, abstract: Any, parts: Iterable[str] | None) -> Any:
    folder = step_folder(directory, record.step)
    leaves, structure = _flatten(abstract)
    saved = record.leaves
    if parts is not None:
        saved = {
            name: leaf
            for name, leaf in saved.items()
            if any(f"{name}/".startswith(f"{part}/") for part in parts)
        }
    _check_fit(folder, saved, {name: _describe(leaf) for name, leaf in leaves.items()})
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or first_device)
        for name, leaf in leaves.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # what may be left out is checked above
    try:
        with context:
            arrays = ocp.load(folder.absolute(), targets)
    except jax.errors.JaxRuntimeError:  # the device's: memory, say
        raise
    # orbax and tensorstore raise a dozen kinds for what they cannot make out
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")[:300]
        raise CheckpointError(
            f"{folder}: cannot be read: {type(error).__name__}: {reason}"
        ) from None
    return jax.tree.unflatten(structure, [arrays[name] for name in leaves])


def _choose(directory: Path, step: int | None) -> int | None:
    """The step to read: the newest that is whole, or `step` if it is; None where no save was ever
    finished.
    """
    candidates = _steps_on_disk(directory)
    if step is not None:
        if step not in candidates:
            available = ", ".join(map(str, steps(directory))) or "none"
            raise CheckpointError(
                f"{directory}: no checkpoint of step {step}; available: {available}"
            )
        candidates = [step]
    broken: list[str] = []
    for candidate in reversed(candidates):
        try:
            _verified_record(directory, candidate)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        if broken:
            logger.warning(
                f"{'; '.join(broken)}; taking {step_folder(directory, candidate)} instead"
            )
        return candidate
    if step is not None:
        raise CheckpointError(
            f"{'; '.join(broken)}; choose another step, or put back a copy of this one"
        )
    if any(_record_path(directory, candidate).exists() for candidate in candidates):
        remedy = f"delete {directory} to start over, or put back a copy of it"
        raise CheckpointError(f"no usable checkpoint: {'; '.join(broken)}; {remedy}")
    if broken:  # a kill in the first save: nothing is lost that was ever finished
        logger.warning(f"{'; '.join(broken)}; passed over, and no other checkpoint is there")
    return None


def _restore(
    directory: Path, abstract: Any, step: int | None, parts: Iterable[str] | None
) -> Restored | None:
    chosen = processes.broadcast(lambda: _choose(directory, step))
    if chosen is None:
        return None
    record = _read_record(directory, chosen)
    return Restored(chosen, _load(directory, record, abstract, parts), record.extra)


def restore(directory: Path, abstract_state: Any, step: int | None = None) -> Restored | None:
    """Reads the newest checkpoint that is whole, or that of `step`; None where no save into
    `directory` was ever finished.

    Every file is verified against the record first, by process 0, whose choice all processes take.
    Newer checkpoints that are unfinished or damaged are passed over with a warning that names them
    and the one taken; a `step` that was asked for is never replaced by another.

    Args:
      directory: a run's `checkpoints` folder. Nothing in it is changed.
      abstract_state: a tree of `jax.ShapeDtypeStruct` with the shardings to restore to, whatever the devices at the time of the
        save; a leaf without a sharding goes to the first device. Typed PRNG keys are leaves like any other.
      step: the step to read; None takes the newest that is whole.

    Raises:
      CheckpointError: `step` is not there or not whole, saves were finished but none is whole any more, or leaves differ in
        path, shape or dtype.
    """
    return _restore(directory, abstract_state, step, parts=None)


def restore_parts(directory: Path, abstract: dict[str, Any], step: int | None = None) -> Restored:
    """`restore` for some of the state's top level, such as `{"params": ...}`: only their arrays
    are read.

    Raises `CheckpointError` as `restore` does, and where there is no checkpoint.
    """
    restored = _restore(directory, abstract, step, parts=abstract)
    if restored is None:
        raise CheckpointError(
            f"{directory}: holds no checkpoint; train first, or give the run that was trained"
        )
    return restored


# ---------------------------------------------------------------------------------------------- writing


class Checkpointer:
    """Saves a run's state in the background and keeps the newest steps and the best one.

    Used as a context manager, by all processes that own the run: entering clears what a killed
    save left behind, leaving waits for the save under way. A save that is under way when the
    interpreter ends without that is lost.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        """`directory` is made if need be; `keep` ≥ 1 newest steps stay, beside the one with the
        lowest validation value.
        """
        if keep < 1:
            raise ValueError(f"keep = {keep} must be at least 1")
        self._directory = directory.absolute()
        self._keep = keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if processes.index() == 0:
                for leftover in self._directory.glob("*.orbax-checkpoint-tmp"):
                    shutil.rmtree(leftover)
                for leftover in self._directory.glob("*.json.tmp-*"):
                    leftover.unlink()
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot hold checkpoints: {error}") from error

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any], *, value: float | None = None
    ) -> None:
        """Saves `state` as of `step`. Returns once the arrays are on the host; they may be donated
        or overwritten then.

        Waits for the save before it, if that is still under way. Of a step that is there already,
        whole, only `extra` and `value` are written anew: the same step of the same run has the
        same arrays. Steps newer than `step` belong to a continuation that was given up (`restore`
        passed them over); they are deleted with the old ones when this is finished.

        Args:
          state: a tree of `jax.Array` without empty arrays, typed PRNG keys included.
          extra: JSON values to keep beside it: data position, seconds elapsed, best value …; no NaN or infinity.
          value: validation value by which the best step is known, lower is better.

        Raises:
          CheckpointError: this save could not start, or the one before it failed (full disk, folder gone or unwritable), which
          `check` and `wait` say earlier.
        """
        self.wait()
        if value is not None and not math.isfinite(value):
            raise ValueError(f"value = {value} is not a finite number")
        leaves, _ = _flatten(state)
        record = _Record(
            step, value, dict(extra), {name: _describe(leaf) for name, leaf in leaves.items()}, {}
        )
        # extra values that JSON cannot hold are the caller's error, now rather than in the
        # background
        _record_text(record)
        if processes.broadcast(lambda: _is_whole(self._directory, step)):
            if processes.index() == 0:  # who writes it: the others might read while it is replaced
                whole = _read_record(self._directory, step)
                record = replace(
                    record, files=whole.files, value=whole.value if value is None else value
                )
            self._pending = self._executor.submit(self._finish, None, record)
            return
        context = ocp.Context()
        # Made in the background, a folder that cannot be made leaves orbax threads waiting 300 s
        # for it at exit.
        context.asynchronous.create_directories_asynchronously = False
        context.asynchronous.timeout_secs = _TIMEOUT
        try:
            with context:
                response = ocp.save_async(
                    step_folder(self._directory, step), leaves, overwrite=True
                )
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = self._executor.submit(self._finish, response, record)

    def _finish(self, response: "ocp.AsyncResponse[None] | None", record: _Record) -> None:
        try:
            if response is not None:
                response.result()
            if processes.index():
                return
            if response is not None:
                record = replace(
                    record, files=_hash_files(step_folder(self._directory, record.step))
                )
            write_text_atomic(_record_path(self._directory, record.step), _record_text(record))
            self._prune(record.step)
        # orbax raises ValueError for a full disk, so nothing narrower would do
        except Exception as error:
            raise self._failure(record.step, error) from error

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        remedy = (
            "free space or mend the folder, then start again: the run resumes from the last"
            " finished checkpoint"
        )
        failure = CheckpointError(
            f"{step_folder(self._directory, step)}: the checkpoint could not be saved: {error};"
            f" {remedy}"
        )
        # what still works on it would print tracebacks as the interpreter ends
        failure.at_once = True
        return failure

    def _prune(self, latest: int) -> None:
        """Deletes every step but the newest ones up to `latest`, which is finished, and the best
        of those up to it.
        """
        finished = [record for record in _finished(self._directory) if record.step <= latest]
        kept = {record.step for record in finished[-self._keep :]} | {_best(finished)}
        for step in _steps_on_disk(self._directory):
            if step not in kept:
                # first: a folder half deleted has no record
                _record_path(self._directory, step).unlink(missing_ok=True)
                if (folder := step_folder(self._directory, step)).exists():
                    shutil.rmtree(folder)

    def check(self) -> None:
        """Raises the `CheckpointError` of a background save that has failed by now. Never waits,
        so a step can afford it.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is finished, recorded and older steps are deleted; raises its
        `CheckpointError`.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, then gives up the background thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            if isinstance(error, UserError):
                error.at_once = True
            logger.error(str(failure))  # the error under way says more, and its exit status counts


def forgive_late_callbacks() -> None:
    """From here on, a callback into an event loop that was closed prints no traceback.

    A save of which one write fails, as on a full disk, is given up with a line; its other writes
    end later, in threads of tensorstore's, and report to the loop of orbax that waited for them
    and is gone.
    """
    shown = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not (
            unraisable.exc_type is RuntimeError
            and str(unraisable.exc_value) == "Event loop is closed"
        ):
            shown(unraisable)

    sys.unraisablehook = hook
