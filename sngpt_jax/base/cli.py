"""What every command shares: one-line errors with exit status 2, the log on stderr, and stable
JSON output.

A command's `main(argv)` returns its exit status and raises `UserError` for a mistake that its user
can mend; `run` turns that into one line on stderr, and sees to it that any encoding can show what
is printed. Anything else that escapes is a bug and shows its traceback.
"""

import codecs
import contextlib
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sngpt_jax.base import terminal
from sngpt_jax.base.errors import EXIT_SIGINT, EXIT_USER_ERROR, FULL, UserError, one_line
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.base.interrupts import end_quietly, heed_interrupts

_PLAIN = dict(zip("│┃─━╸╺╭╮╰╯┌┐└┘×≤µ–", "||----++++++++x<u-", strict=True)) | {"…": "...", "▁": "_"}


def drop_output() -> None:
    """Sends stdout, what waits to be written included, nowhere from here on: it cannot be written
    any more.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed before Python began
            with contextlib.suppress(OSError):
                stream.flush()


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main` on the command line's arguments and exits with its status; `UserError` is one
    line and status 2.
    """
    codecs.register_error("plain", _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    sys.unraisablehook = heed_interrupts
    try:
        if signal.getsignal(signal.SIGINT) is end_quietly:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main(sys.argv[1:])
        if sys.stdout is not None:  # closed before Python began
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_SIGINT
    except BrokenPipeError:
        # `… | head` closed stdout: nothing is left to say
        drop_output()
        status = 0
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        status = EXIT_USER_ERROR
        with contextlib.suppress(OSError):
            terminal.clear()
            print(f"error: {escape_controls(line)}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno in FULL:
            drop_output()  # stdout itself may be what cannot be written
        if isinstance(error, UserError) and error.at_once:
            _flush()
            os._exit(status)
    sys.exit(status)


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """What is printed in place of characters that a terminal's encoding lacks: the nearest of
    ASCII's, or their escapes.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return (
        "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found),
        error.end,
    )


def escape_controls(text: str) -> str:
    """`text` with control characters but line ends and tabs escaped: a terminal would obey those
    that a file has put there.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def progress(line: str) -> None:
    """One line for whoever waits, on stderr; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def check_json(destination: str) -> None:
    """`check_writable` of what `--json` names, where that is a file."""
    if destination not in ("", "-"):
        check_writable(Path(destination), "--json")


def write_json(value: Any, destination: str | None) -> None:
    """Prints `value` as one JSON object on stdout (`destination` "-"), or writes it to the file
    `destination` names.

    No `destination`: does nothing. The value holds no NaN or infinity. Raises `UserError` where
    the file cannot be written.
    """
    if not destination:
        return
    text = json.dumps(value, indent=2, allow_nan=False)
    if destination == "-":
        print(text)
    else:
        write_text_atomic(Path(destination), text + "\n")


def command(module: str, *arguments: str) -> str:
    """A command line for a person to paste: `module` run by this interpreter, which may not be the
    one named python.
    """
    interpreter = Path(sys.executable)
    if interpreter.is_relative_to(Path.cwd()):
        interpreter = interpreter.relative_to(Path.cwd())
    return shlex.join([str(interpreter), "-m", module, *arguments])


def log_to_stderr(quiet: bool = False) -> None:
    """Sends the packages' log lines to stderr as they are; stdout is for results. `quiet`:
    warnings and errors alone.

    Progress is shown where lines of the level INFO are.
    """
    handler = terminal.LogHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("sngpt_jax", "sngpt_kernels"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def expand_json(argv: Sequence[str]) -> list[str]:
    """`argv` with a bare `--json` written as `--json -`, so that the option's path may be left
    out.
    """
    expanded: list[str] = []
    for i, argument in enumerate(argv):
        expanded.append(argument)
        if argument == "--json" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            expanded.append("-")
    return expanded
