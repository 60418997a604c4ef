"""Checkpoints: orbax writes the arrays, and only steps with a whole record (`records`) are trusted.

Each leaf of the state is saved under its path in the tree. Old steps are deleted here, because
orbax would delete them before the new step has its record: a kill in between would leave no step
to trust.
"""

import logging
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sngpt_jax.base.files import remove_leftovers, write_text_atomic
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.mesh import leaves_by_path
from sngpt_jax.run.records import CheckpointError as CheckpointError
from sngpt_jax.run.records import (
    SaveRecord,
    best,
    check_path,
    finished,
    hash_files,
    is_read,
    is_whole,
    read_record,
    reading,
    record_path,
    record_text,
    steps_on_disk,
    verified_record,
)
from sngpt_jax.run.records import step_folder as step_folder

logger = logging.getLogger("sngpt_jax")
# orbax's threads log the traceback of a failed write and then raise the same error here
logging.getLogger("absl").addFilter(
    lambda record: "_SignalingThread.run() raised" not in str(record.msg)
)

# Seconds after which orbax gives a save up, by the system clock, which may jump.
_TIMEOUT = 30 * 86_400


@dataclass(frozen=True)
class Restored:
    """A state read back, with what was saved beside it."""

    step: int
    state: Any  # the tree asked for, with arrays for its leaves, placed by its shardings
    extra: dict[str, Any]  # as given to `save`, through JSON


def steps(directory: Path) -> list[int]:
    """The steps whose save finished, ascending. Only `restore` verifies their bytes."""
    return [record.step for record in finished(directory)]


def _described(leaves: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()
    }


def _check_fit(folder: Path, saved: Mapping[str, str], asked: Mapping[str, str]) -> None:
    problems = []
    for name in {**asked, **saved}:
        found, expected = saved.get(name, "nothing"), asked.get(name, "nothing")
        if found != expected:
            place = name[:200] or "the state"
            problems.append(f"{place}: saved {found[:100]}, expected {expected}")
    if problems:
        shown = "; ".join(problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{folder}: does not fit the state asked for: {shown}{more}")


def _load(directory: Path, record: SaveRecord, abstract: Any, parts: Iterable[str] | None) -> Any:
    folder = step_folder(directory, record.step)
    leaves = leaves_by_path(abstract)
    saved = {
        name: leaf
        for name, leaf in record.leaves.items()
        if parts is None or any(f"{name}/".startswith(f"{part}/") for part in parts)
    }
    _check_fit(folder, saved, _described(leaves))
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = {
        name: leaf if leaf.sharding else leaf.update(sharding=first_device)
        for name, leaf in leaves.items()
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # `_check_fit` has checked what may be missing
    try:
        with context:
            arrays = ocp.load(folder.absolute(), targets)
    except jax.errors.JaxRuntimeError:  # the device's, such as of memory
        raise
    except Exception as error:  # a dozen kinds, for content that orbax cannot decode
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
        raise CheckpointError(f"{folder}: cannot be read: {reason}") from None
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in leaves])


def _choose(directory: Path, step: int | None) -> int | None:
    """The step to read: `step`, or the newest whole one; None if no save finished."""
    candidates = steps_on_disk(directory)
    if step is not None:
        if step not in candidates:
            there = ", ".join(map(str, steps(directory))) or "none"
            raise CheckpointError(f"{directory}: no checkpoint of step {step}; available: {there}")
        candidates = [step]
    broken: list[str] = []
    recorded = {other for other in candidates if record_path(directory, other).exists()}
    for candidate in reversed(candidates):
        try:
            with reading(directory, candidate):
                verified_record(directory, candidate)
        except CheckpointError as error:
            if candidate in recorded and not record_path(directory, candidate).exists():
                return _choose(directory, step)  # a training has deleted it: list again
            broken.append(str(error))
            continue
        if broken:
            chosen = step_folder(directory, candidate)
            logger.warning(f"{'; '.join(broken)}; taking {chosen} instead")
        return candidate
    reasons = "; ".join(broken)
    if step is not None:
        raise CheckpointError(f"{reasons}; choose another step, or put back a copy of this one")
    if any(record_path(directory, candidate).exists() for candidate in candidates):
        remedy = f"delete {directory} to start over, or put back a copy of it"
        raise CheckpointError(f"no usable checkpoint: {reasons}; {remedy}")
    if broken:  # a kill in the first save loses nothing that ever finished
        logger.warning(f"{reasons}; skipped, and there is no other checkpoint")
    return None


def restore(
    directory: Path,
    abstract_state: Any,
    step: int | None = None,
    parts: Iterable[str] | None = None,
) -> Restored | None:
    """Reads the newest whole checkpoint of the folder, or that of `step`; None if no save ever
    finished.

    Process 0 verifies every file against the record first, and all processes take its choice.
    A warning names newer checkpoints that are unfinished or damaged. `abstract_state` is a tree of
    `jax.ShapeDtypeStruct` with the shardings to restore to, whatever the devices were at the save.
    A leaf without a sharding goes to the first device. `parts` are names of the state's top level,
    if the tree has only these.

    Raises `CheckpointError` if `step` is missing or damaged, if every finished save is damaged, or
    if leaves differ in path, shape or dtype.
    """
    check_path(directory)
    while True:
        chosen = processes.broadcast(lambda: _choose(directory, step))
        if chosen is None:
            return None
        with reading(directory, chosen):
            try:
                record = read_record(directory, chosen)
                state = _load(directory, record, abstract_state, parts)
                return Restored(chosen, state, record.extra)
            except CheckpointError:
                # a training has deleted it since it was chosen: choose again, if no other process
                # waits for this one
                kept = record_path(directory, chosen).exists()
                if kept or step is not None or processes.count() > 1:
                    raise


def restore_parts(directory: Path, abstract: dict[str, Any], step: int | None = None) -> Restored:
    """`restore` for parts of the state's top level, such as `{"params": ...}`. It reads only their
    arrays, and raises `CheckpointError` also if there is no checkpoint.
    """
    restored = restore(directory, abstract, step, parts=abstract)
    if restored is None:
        raise CheckpointError(f"{directory}: holds no checkpoint; give a run that was trained")
    return restored


class Checkpointer:
    """Saves a run's state in the background, and keeps the `keep` newest steps and the best one.

    A context manager that all processes of the run enter. Leaving waits for the save under way.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Makes `directory`, and deletes what a killed save left there."""
        self._directory = directory.absolute()
        self._keep = keep
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._directory.mkdir(parents=True, exist_ok=True)
        if processes.index() == 0:
            for leftover in self._directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(leftover)
            remove_leftovers(self._directory)

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any], *, value: float | None = None
    ) -> None:
        """Saves `state`, a tree of `jax.Array` without empty ones, as of `step`. Returns once the
        arrays are on the host, so that they may be donated or overwritten.

        Waits for the save before it. If a whole `step` is there already, only `extra` and `value`
        are written: the same step of the same run has the same arrays. Steps newer than `step` are
        damaged, since `restore` skipped them. They are deleted with the old ones.

        `extra` are JSON values without NaN or infinity. `value` is the validation value of the
        step; lower is better. Raises `CheckpointError` if this save could not start, or if the one
        before it failed.
        """
        self.wait()
        leaves = leaves_by_path(state)
        record = SaveRecord(step, value, dict(extra), _described(leaves), {})
        record_text(record)  # raises now for values that JSON cannot hold
        response = None
        if processes.broadcast(lambda: self._keep_whole(step)):
            if processes.index() == 0:  # only the writer: the record is replaced meanwhile
                whole = read_record(self._directory, step)
                value = whole.value if value is None else value
                record = replace(record, files=whole.files, value=value)
        else:
            context = ocp.Context()
            # else orbax's threads would wait 300 s at exit for a folder that cannot be made
            context.asynchronous.create_directories_asynchronously = False
            context.asynchronous.timeout_secs = _TIMEOUT
            folder = step_folder(self._directory, step)
            try:
                with context:
                    response = ocp.save_async(folder, leaves)
            except (OSError, ValueError) as error:  # a ValueError if the folder is there again
                raise self._failure(step, error) from error
        self._pending = self._executor.submit(self._finish, response, record)

    def _keep_whole(self, step: int) -> bool:
        """Whether a whole `step` is there. Otherwise what a killed or damaged save left of it is
        deleted.

        orbax's `overwrite` would let each process look for the folder by itself. A process that
        looks after another one has deleted the folder waits elsewhere than that one, for ever.
        """
        if is_whole(self._directory, step):
            return True
        try:
            self._delete(step)
        except OSError as error:
            raise self._failure(step, error) from error
        return False

    def _delete(self, step: int) -> None:
        # before the folder: half a folder must have no record
        record_path(self._directory, step).unlink(missing_ok=True)
        if (folder := step_folder(self._directory, step)).exists():
            shutil.rmtree(folder)

    def _finish(self, response: "ocp.AsyncResponse[None] | None", record: SaveRecord) -> None:
        try:
            if response is not None:
                response.result()
            if processes.index():
                return
            if response is not None:
                folder = step_folder(self._directory, record.step)
                record = replace(record, files=hash_files(folder))
            write_text_atomic(record_path(self._directory, record.step), record_text(record))
            self._prune(record.step)
        except Exception as error:  # orbax raises ValueError for a full disk
            raise self._failure(record.step, error) from error

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        files = "Too many open files" in str(error)
        remedy = "raise ulimit -n" if files else "free space or repair the folder"
        failure = CheckpointError(
            f"{step_folder(self._directory, step)}: the checkpoint could not be saved: {error};"
            f" {remedy}, then start again: the run resumes from the last finished checkpoint"
        )
        failure.at_once = True  # orbax's threads would print tracebacks as the interpreter ends
        return failure

    def _prune(self, latest: int) -> None:
        """Deletes all steps but the newest ones and the best one up to `latest`, which is whole.

        A save inside a series of skipped steps does not count as one of the newest: the series may
        end the run, and an earlier step is then the last good one. A step that somebody reads stays
        until a later save.
        """
        records = [record for record in finished(self._directory) if record.step <= latest]
        counted = [record.step for record in records if not record.extra.get("skipped_in_a_row")]
        kept = {latest, best(records), *counted[-self._keep :]}
        for step in steps_on_disk(self._directory):
            if step not in kept and not is_read(self._directory, step):
                self._delete(step)

    def check(self) -> None:
        """Raises the `CheckpointError` of a background save that has failed by now. Never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the end of the last save; raises its `CheckpointError`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.at_once = True  # type: ignore[attr-defined]
            logger.error(str(failure))  # the error under way sets the exit status
        finally:
            self._executor.shutdown()


def forgive_late_callbacks() -> None:
    """From here on, a callback into a closed event loop prints no traceback: after a failed save,
    tensorstore's other writes call back into orbax's event loop, which is closed by then.
    """
    shown = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if repr(unraisable.exc_value) != "RuntimeError('Event loop is closed')":
            shown(unraisable)

    sys.unraisablehook = hook
