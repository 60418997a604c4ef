"""What is asked of every file that somebody else may have written, before it is read: that it is a
plain file, no larger than such a file can be, and where a file names others, that they lie in its
own folder."""

import hashlib
import os
import re
import stat
from pathlib import Path

from sngpt_jax.base.errors import UserError

MAX_NAME = 1000  # letters of a path in a folder


def shown(value: object) -> str:
    """`value` as a line can quote it, whatever a file has put there."""
    text = repr(value[:100] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= 120 else f"{text[:120]} …"


def plain_size(path: Path, error: type[UserError]) -> int:
    """The bytes that the file `path` has; raises `error` in one line where it is no plain file."""
    try:
        found = path.stat()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    except ValueError as problem:  # a path that no file can have
        raise error(f"{shown(str(path))}: cannot be read: {problem}") from None
    if not stat.S_ISREG(found.st_mode):  # a pipe would never end, and neither would some devices
        raise error(f"{path}: cannot be read: not a plain file")
    return found.st_size


def read_bytes(path: Path, limit: int, error: type[UserError]) -> bytes:
    """The bytes of the file `path`; raises `error` in one line where it is no plain file, or has
    more than `limit` bytes.
    """
    plain_size(path, error)
    try:
        with open(path, "rb") as file:
            # of the file that is open: its name may stand for another one by now
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(limit, size) + 1)  # so much is allocated, whatever is there
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    if len(content) > limit:
        raise error(
            f"{path}: {max(size, len(content)):,} bytes; no file of its kind has more than"
            f" {limit:,}"
        )
    return content


def file_sha256(path: Path, error: type[UserError]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal; raises `error` in one line where it cannot be
    read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None


def problem_of_name(name: str) -> str | None:
    """Why `name`, from a file, is no path of a file below that file's folder, whatever the system;
    None where it is one.
    """
    if not name or len(name) > MAX_NAME:
        return f"has {len(name)} letters"
    if re.search(r"[\\\x00-\x1f\x7f]|^[A-Za-z]:", name):
        return "holds a backslash, a drive or a control character"
    if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return "is no path below its folder"
    return None


def inside(folder: Path, name: str, error: type[UserError]) -> Path:
    """`folder / name`, for a `name` that a file in `folder` gives, with / between its parts.

    It need not exist. Raises `error` in one line where the name, or a link on the way, leads out
    of the folder, and where what is there is no plain file.
    """
    if problem := problem_of_name(name):
        raise error(f"{folder}: names the file {shown(name)}, which {problem}")
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise error(
                f"{path}: a link that leads out of {folder}; put the file itself there, or link the"
                " whole folder"
            )
        if path.exists() and not path.is_file():
            raise error(f"{path}: not a plain file")
    except (OSError, RuntimeError) as problem:  # links in a circle
        raise error(f"{path}: cannot be read: {problem}") from None
    return path
