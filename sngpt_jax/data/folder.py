"""The folder that a preparation writes: held by one process at a time, begun once and gone on with
until it is whole.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Manifest,
    Origin,
    Progress,
    load_manifest,
    load_progress,
    save,
)
from sngpt_jax.data.shards import open_entries
from sngpt_jax.data.spec import differing_fields

PARTS = ".parts"  # a folder in it while the source is encoded in parts (`sngpt_jax.data.parts`)


def refuse_other(out: Path, old: Origin, new: Origin) -> None:
    """Raises `UserError` where `out` holds data of another origin, naming the fields that differ."""
    if lines := differing_fields(old, asdict(new)).values():
        raise UserError(
            f"{out}: holds another preparation's data ({'; '.join(lines)}); give another --out, or"
            " delete it"
        )


def finished(out: Path, origin: Origin) -> Manifest | None:
    """The manifest of a folder that is complete and of this origin, or None where it is not
    complete.
    """
    if not (out / MANIFEST).is_file():
        return None
    manifest = load_manifest(out)
    refuse_other(out, manifest.origin, origin)
    open_entries(out, (*manifest.val, *manifest.train))
    return manifest


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder `out` where there is none and holds it. Raises `UserError` where another
    process does, and in place of an `OSError` of the block: no space, no permission, a file where
    the folder should be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{out}: another preparation is writing there; wait for it, or give another"
                    " --out"
                ) from None
            yield
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from error


def begin_or_resume(out: Path, origin: Origin) -> Progress:
    """The journal of a folder that is held; a new one where nothing was written yet. Raises
    `UserError` for another's data.
    """
    for stale in out.glob("*.tmp-*"):  # of a killed run: the lock is ours
        # the name that `write_bytes_atomic` gives
        if stale.suffix[5:].isdigit() and stale.is_file():
            stale.unlink()
    if (out / PROGRESS).is_file():
        progress = load_progress(out)
        if progress.origin == origin:
            return progress
        if progress.train.shards or progress.val.shards or (out / PARTS).is_dir():
            refuse_other(out, progress.origin, origin)
    elif any(out.glob("*.bin")):
        raise UserError(
            f"{out}: holds .bin files that no preparation here has written; give an empty --out"
        )
    progress = Progress(format=FORMAT, origin=origin)
    save(progress, out)
    return progress
