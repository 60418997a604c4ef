"""The folder that a preparation writes: one process holds it, and resumes it until it is whole."""

from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import locked, remove_leftovers
from sngpt_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Journal,
    Manifest,
    Origin,
    load_journal,
    load_manifest,
    save,
)
from sngpt_jax.data.shards import open_entries
from sngpt_jax.data.spec import differing_fields

PARTS = ".parts"  # subfolder while the source is encoded in parts (`sngpt_jax.data.parts`)


def refuse_other(out: Path, old: Origin, new: Origin) -> None:
    """Raises `UserError` that names the differing fields if `out` holds data of another origin."""
    if lines := differing_fields(old, asdict(new)).values():
        raise UserError(
            f"{out}: holds another preparation's data ({'; '.join(lines)}); give another --out, or"
            " delete it"
        )


def finished(out: Path, origin: Origin) -> Manifest | None:
    """The manifest of a complete folder of this origin; None if the folder is not complete."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = load_manifest(out)
    refuse_other(out, manifest.origin, origin)
    open_entries(out, (*manifest.val, *manifest.train))
    return manifest


def held(out: Path) -> AbstractContextManager[None]:
    """Makes the folder `out` and holds it. Raises `UserError` if another process holds it."""
    return locked(
        out, f"{out}: another preparation is writing there; wait for it, or give another --out"
    )


def begin_or_resume(out: Path, origin: Origin) -> Journal:
    """The journal of the held folder `out`, a new one if nothing was written yet. Raises
    `UserError` if the folder holds other data.
    """
    remove_leftovers(out)
    if (out / PROGRESS).is_file():
        journal = load_journal(out)
        if journal.origin == origin:
            return journal
        if journal.train.shards or journal.val.shards or (out / PARTS).is_dir():
            refuse_other(out, journal.origin, origin)
    elif any(out.glob("*.bin")):
        raise UserError(
            f"{out}: holds .bin files that no preparation here has written; give an empty --out"
        )
    journal = Journal(FORMAT, origin)
    save(journal, out)
    return journal
