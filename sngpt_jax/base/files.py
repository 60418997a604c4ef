"""Files that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from sngpt_jax.base.errors import UserError


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes `path` so that a reader, or a run killed half way, sees the old file or the new one,
    never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of the text's UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def check_writable(path: Path, option: str) -> None:
    """Raises `UserError` where the file that `option` names could not be written: before the work,
    rather than after it.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {path}: cannot be written: {error.strerror}; give the path of a file"
        ) from None
