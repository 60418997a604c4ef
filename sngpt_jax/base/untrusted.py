"""Checks of files that somebody else may have written, before they are read.

Such a file must be plain and no larger than its kind can be. Files that it names must lie in its
folder. The parameter `error` is the error to raise, in one line.
"""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from sngpt_jax.base.errors import UserError

MAX_NAME = 1000  # characters of a path in a folder

# What a clone without the large files has in their place: a text of less than 1024 bytes.
_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024


def shown(value: object) -> str:
    """`value`, whatever a file has put there, as a line can quote it."""
    text = repr(value[:100] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 120 else f"{text[:120]} …"


@contextlib.contextmanager
def _reading(path: Path, error: type[UserError]) -> Iterator[None]:
    """Turns an `OSError` into `error`: callers fall back on other files where one is unreadable."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from None


def plain_size(path: Path, error: type[UserError]) -> int:
    """The size in bytes of a plain file. Refuses a pointer of Git LFS."""
    try:
        with _reading(path, error):
            found = path.stat()
    except ValueError as problem:  # a null byte in the path
        raise error(f"{shown(str(path))}: cannot be read: {problem}") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe and some devices would never end
        raise error(f"{path}: cannot be read: not a plain file")
    if found.st_size < _POINTER_BYTES:
        with _reading(path, error), open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                pull = "fetch the file: git lfs pull"
                raise error(f"{path}: a pointer of Git LFS in place of the file; {pull}")
    return found.st_size


def read_bytes(path: Path, limit: int, error: type[UserError]) -> bytes:
    """The bytes of a plain file of at most `limit` bytes."""
    plain_size(path, error)
    with _reading(path, error), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # the name may mean another file by now
        content = file.read(min(limit, size) + 1)  # allocates no more than this
    if len(content) > limit:
        size = max(size, len(content))
        raise error(f"{path}: {size:,} bytes; no file of its kind has more than {limit:,}")
    return content


def read_start(path: Path, count: int, error: type[UserError]) -> tuple[bytes, int]:
    """The first `count` bytes of a plain file, or all of a shorter one, and its size."""
    size = plain_size(path, error)
    with _reading(path, error), open(path, "rb") as file:
        return file.read(count), size


def file_sha256(path: Path, error: type[UserError]) -> str:
    """The SHA-256 of a plain file in hexadecimal."""
    plain_size(path, error)
    with _reading(path, error), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_of_name(name: str) -> str | None:
    """Why `name`, from a file, is not a path below that file's folder on some system, or None."""
    if not name or len(name) > MAX_NAME:
        return f"has {len(name)} letters"
    if re.search(r"[\\\x00-\x1f\x7f]|^[A-Za-z]:", name):
        return "holds a backslash, a drive or a control character"
    if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "is no path below its folder"
    return None


def inside(folder: Path, name: str, error: type[UserError]) -> Path:
    """`folder / name` for a `name` from a file in `folder`. Refuses a name or a link that leads out
    of the folder, or to what is not a plain file. The path need not exist.
    """
    if problem := problem_of_name(name):
        raise error(f"{folder}: names the file {shown(name)}, which {problem}")
    path = folder / name
    try:
        with _reading(path, error):
            if not path.resolve().is_relative_to(folder.resolve()):
                raise error(
                    f"{path}: a link that leads out of {folder}; put the file itself there, or link"
                    " the whole folder"
                )
            if path.exists() and not path.is_file():
                raise error(f"{path}: not a plain file")
    except RuntimeError as problem:  # links in a circle
        raise error(f"{path}: cannot be read: {problem}") from None
    return path
