"""What every command shares, here and in `sngpt_jax.cli`: one-line errors with exit status 2, and stable JSON output.

A command's `main(argv)` returns its exit status and raises `UserError` for a mistake that its user can mend;
`run` turns that into one line on stderr, and sees to it that any encoding can show what is printed. Anything else that escapes
is a bug and shows its traceback.
"""

import codecs
import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

EXIT_USER_ERROR = 2
EXIT_SIGINT = 130

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, this user's share of it, or the largest file that is allowed


_PLAIN = dict(zip("│┃─━╸╺╭╮╰╯┌┐└┘×≤µ–", "||----++++++++x<u-", strict=True)) | {"…": "...", "▁": "_"}


class UserError(Exception):
    """A mistake of the user's: one line that says what was wrong, where, and what to do."""

    at_once = False  # whether the process is to end as soon as that is said, without waiting for what else is at work in it


def _end_quietly(number: int, frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar hides
        sys.stderr.flush()
    os._exit(EXIT_SIGINT)


def _heed_interrupts(unraisable: Any) -> None:
    """For `sys.unraisablehook`: Ctrl-C while the interpreter is in a callback of its own, where the exception goes nowhere."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _end_quietly(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)


def expect_interrupts() -> None:
    """Until `run` begins, Ctrl-C ends the process with a word instead of a traceback.

    To be called as a package is imported: nothing where that is not by `python -m`, whose modules take seconds to import.
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_quietly)


def drop_output() -> None:
    """Sends stdout, what waits to be written included, nowhere from here on: it cannot be written any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed before Python began
            with contextlib.suppress(OSError):
                stream.flush()


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main` on the command line's arguments and exits with its status; `UserError` is one line and status 2."""
    codecs.register_error("plain", _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    sys.unraisablehook = _heed_interrupts
    try:
        if signal.getsignal(signal.SIGINT) is _end_quietly:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(sys.argv[1:])
        if sys.stdout is not None:  # closed before Python began
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {escape_controls(' '.join(str(error).split()))}", file=sys.stderr)
        status = EXIT_USER_ERROR
        if error.at_once:
            _flush()
            os._exit(status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_SIGINT
    except BrokenPipeError:  # `… | head` closed our stdout: not an error of ours, and nothing is left to say
        drop_output()
        status = 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        drop_output()
        where = error.filename or "stdout, or a file,"
        print(f"error: {where} cannot be written: {error.strerror}; free space and start again", file=sys.stderr)
        status = EXIT_USER_ERROR
    sys.exit(status)


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """What is printed in place of characters that a terminal's encoding lacks: the nearest of ASCII's, or their escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found), error.end


def escape_controls(text: str) -> str:
    """`text` with control characters but line ends and tabs escaped: a terminal would obey those that a file has put there."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def progress(line: str) -> None:
    """One line for whoever waits, on stderr; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Writes `path` so that a reader, or a run killed half way, sees the old file or the new one, never a part."""
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
    """Raises `UserError` where the file that `option` names could not be written: before the work, rather than after it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written: {error.strerror}; give the path of a file") from None


def check_json(destination: str) -> None:
    """`check_writable` of what `--json` names, where that is a file."""
    if destination not in ("", "-"):
        check_writable(Path(destination), "--json")


def write_json(value: Any, destination: str | None) -> None:
    """Prints `value` as one JSON object on stdout (`destination` "-"), or writes it to the file `destination` names.

    No `destination`: does nothing. The value holds no NaN or infinity. Raises `UserError` where the file cannot be written.
    """
    if not destination:
        return
    text = json.dumps(value, indent=2, allow_nan=False)
    if destination == "-":
        print(text)
    else:
        try:
            write_text_atomic(Path(destination), text + "\n")
        except OSError as error:
            raise UserError(f"--json {destination}: cannot be written: {error.strerror}; give the path of a file") from None
