"""Files that appear whole or not at all, and folders that one process holds."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sngpt_jax.base.errors import UserError

LOCK = ".lock"  # file in a folder that a process holds, or has held


def at_home(path: str) -> str:
    """`path` with a leading ~ or ~user replaced by that home folder. Raises `UserError` if there
    is none.
    """
    found = os.path.expanduser(path)
    if found == path and path.startswith("~"):
        user = path.partition("/")[0][1:]
        if user:
            raise UserError(
                f"{path}: there is no user {user} with a home folder; give the whole path, or"
                f" ./{path} for a file of this name"
            )
        raise UserError(f"{path}: there is no home folder; set HOME, or give the whole path")
    return found


def visible(folder: Path, pattern: str) -> list[Path]:
    """The paths in `folder` that match, by name. Names that begin with a dot are left out: they are
    of other programs, such as `._x` of an archive from a Mac.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes `path`. A reader sees the whole old file or the whole new one, even after a kill. An
    `OSError` names a file.

    A link is followed. A pipe or a device takes the bytes as they come, and stays what it is.
    """
    if stream := _stream(path):
        _write_stream(stream, content)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # of a write or fsync, on a full disk
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _stream(path: Path) -> Path | None:
    """The pipe, the device, or the descriptor of this process that the path or its link names."""
    if not path.exists():
        return None
    while True:
        # the shell's redirection to a plain file would lose its other lines
        if os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/")):
            return path
        if not path.is_symlink():
            return None if path.is_file() or path.is_dir() else path
        path = path.parent / os.readlink(path)


def _write_stream(path: Path, content: bytes) -> None:
    descriptor = {"/dev/stdout": 1, "/dev/stderr": 2}.get(os.path.abspath(path))
    try:
        # the descriptor keeps its position
        with open(descriptor or path, "ab", closefd=not descriptor) as stream:
            stream.write(content)
    except BrokenPipeError:
        if descriptor:
            raise
        raise UserError(f"{path}: its reader closed the pipe before it had everything") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` of the text in UTF-8."""
    write_bytes_atomic(path, text.encode("utf-8"))


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed writers left in `folder`, which this process has locked."""
    for path in folder.glob("*.tmp-*"):
        if path.suffix[5:].isdigit() and path.is_file():
            path.unlink()


@contextlib.contextmanager
def locked(folder: Path, held: str) -> Iterator[None]:
    """Makes `folder` if it is missing, and locks it inside the context. Raises `UserError(held)` if
    another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:  # a link's target keeps its bytes
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(held) from None
        except OSError as error:  # such as a file system without locks
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(folder)) from None
        yield


def check_writable(path: Path, option: str) -> None:
    """Raises `UserError` if the file that `option` names cannot be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if _stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(0, "its permissions do not allow it")
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{option} {path}: cannot be written: {error.strerror}; give the path of a file"
        ) from None
