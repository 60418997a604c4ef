"""Which files of a source are text.

In a folder these are all files below it whose names have one of `ENDINGS`. Names that begin with a
dot are skipped, and so are folders that `prepare` wrote. Links are followed. Each folder is entered
once, so that loops of links end.
"""

import os
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import LOCK
from sngpt_jax.base.untrusted import plain_size
from sngpt_jax.data.manifest import MANIFEST, PROGRESS, DataError

TEXT = (".txt", ".md", ".py")
ROWS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
ENDINGS = (*TEXT, *ROWS)
EXPECTED = f"{', '.join(ENDINGS[:-1])} (each also with {' or '.join(PACKED)}) or {ENDINGS[-1]}"

_MOST_SHOWN = 8  # endings


@dataclass(frozen=True)
class Found:
    """What a source's path holds."""

    texts: list[Path]  # by their names below the path
    others: Counter[str]  # files of other kinds, by the endings of their names


def format_of(path: Path) -> tuple[str, str]:
    """The one of `ENDINGS` that a file's name has, and the one of `PACKED` or "". Both are "" for
    a file of another kind.
    """
    name = path.name.lower()
    packed = next((end for end in PACKED if name.endswith(end)), "")
    ending = os.path.splitext(name.removesuffix(packed))[1]
    known = ending in ENDINGS[: -1 if packed else None]  # Parquet compresses its pages itself
    return (ending, packed) if known else ("", "")


def find(path: Path) -> Found:
    """The files of text at `path`, a file or a folder. Raises `UserError` if there is none, and
    `DataError` for what cannot be read and for a link that leads nowhere.
    """
    if not path.is_dir():
        if not format_of(path)[0]:
            raise UserError(f"{path}: no text; expected a file ending in {EXPECTED}")
        _check_readable(path)
        return Found([path], Counter())
    found = Found([], Counter())
    entered: set[str] = set()
    pending = deque([(path, os.path.realpath(path))])
    while pending:
        folder, real = pending.popleft()
        if real in entered:
            continue
        entered.add(real)
        names = _names(folder)
        if not {MANIFEST, PROGRESS}.isdisjoint(names) and (folder / LOCK).exists():
            continue
        for name in names:
            below = folder / name
            linked = below.is_symlink()
            if linked and not os.path.exists(below):
                problem = f"a link to {os.readlink(below)}, which cannot be opened"
                raise DataError(f"{below}: {problem}; restore what it names, or delete the link")
            if not os.path.isdir(below):
                _take(below, found)
            elif linked:  # last, so that a folder's own name comes before those of its links
                pending.append((below, os.path.realpath(below)))
            else:
                pending.appendleft((below, os.path.join(real, name)))
    if not found.texts:
        others = f"; found {left_out(found)}" if found.others else ""
        raise UserError(f"{path}: no text; expected files ending in {EXPECTED}{others}")
    found.texts.sort(key=lambda text: text.relative_to(path).as_posix())
    return found


def left_out(found: Found) -> str:
    """How many files of other kinds there are, and their endings."""
    count, kinds = found.others.total(), found.others.most_common()
    names = ", ".join(kind for kind, _ in kinds[:_MOST_SHOWN])
    more = ", …" if len(kinds) > _MOST_SHOWN else ""
    return f"{count:,} file{'s' * (count != 1)} of other kinds: {names}{more}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as problem:
        raise DataError(f"{folder}: cannot be read: {problem.strerror}") from None


def _take(path: Path, found: Found) -> None:
    if format_of(path)[0]:
        _check_readable(path)
        found.texts.append(path)
    else:
        found.others[path.suffix or "no ending"] += 1


def _check_readable(path: Path) -> None:
    """Raises `DataError` for what is no plain file, a pointer of Git LFS, or not ours to read."""
    plain_size(path, DataError)
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read; change its permissions, or move it away")
