"""What every command shares: one-line errors with exit status 2, the log on stderr, JSON output.

A command's `main(argv)` returns its exit status, and raises `UserError` for a user's mistake.
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
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sngpt_jax.base import terminal
from sngpt_jax.base.errors import EXIT_SIGINT, EXIT_USER_ERROR, FULL, one_line
from sngpt_jax.base.files import check_writable, write_text_atomic
from sngpt_jax.base.interrupts import end_quietly, heed_interrupts

# jax reads these, and they change what a command computes, or forbid what it does
_IGNORED = (
    "JAX_DEFAULT_DTYPE_BITS",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_ENABLE_X64",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_NUMPY_RANK_PROMOTION",
    "JAX_THREEFRY_PARTITIONABLE",
    "JAX_TRANSFER_GUARD",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE",
)
_PLAIN = dict(zip("│┃─━╸╺╭╮╰╯┌┐└┘×≤µ–", "||----++++++++x<u-", strict=True)) | {"…": "...", "▁": "_"}


def drop_output() -> None:
    """Discards what is written to stdout from now on, and what its buffer holds."""
    if sys.stdout is not None:  # closed before Python began
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed before Python began
        stream.flush()


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main` on the command line's arguments and exits with its status.

    An error that `one_line` knows is one line on stderr. Any other is a bug and shows its
    traceback. Characters that the terminal's encoding lacks are replaced. Environment variables
    that would change jax's numbers, or forbid its work, are ignored.
    """
    codecs.register_error("plain", _in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")
    sys.unraisablehook = heed_interrupts
    try:
        if signal.getsignal(signal.SIGINT) is end_quietly:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            os.getcwd()  # a deleted working folder ends the command now, not after its work
            for name in _IGNORED:
                if os.environ.pop(name, None) is not None:
                    print(
                        f"{name} is ignored: it changes what jax computes or allows",
                        file=sys.stderr,
                    )
            status = main(sys.argv[1:])
        finally:
            with contextlib.suppress(OSError):
                terminal.clear()
        _flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_SIGINT
    except BrokenPipeError:  # `… | head` has closed stdout
        drop_output()
        status = 0
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        status = EXIT_USER_ERROR
        with contextlib.suppress(OSError):
            print(f"error: {escape_controls(line)}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno in FULL:
            drop_output()  # stdout itself may be what cannot be written
        if getattr(error, "at_once", False):
            with contextlib.suppress(OSError):
                _flush()
            os._exit(status)
    sys.exit(status)


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """For `codecs`: the ASCII that stands for characters which an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    plain = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in found)
    return "".join(plain), error.end


def escape_controls(text: str) -> str:
    """`text` with escaped control characters, except line ends and tabs: a terminal obeys them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def progress(line: str) -> None:
    """Prints a line of progress on stderr."""
    print(line, file=sys.stderr, flush=True)


def check_json(destination: str) -> None:
    """`check_writable` for the file, if any, that `--json` names."""
    if destination not in ("", "-"):
        check_writable(Path(destination), "--json")


def write_json(value: Any, destination: str | None) -> None:
    """Prints `value` as JSON for the destination "-", or writes the file that it names, if any."""
    if not destination:
        return
    text = json.dumps(value, indent=2, allow_nan=False)
    if destination == "-":
        print(text)
    else:
        write_text_atomic(Path(destination), text + "\n")


def command(module: str, *arguments: str) -> str:
    """A command line that runs `module` by this interpreter, for a person to paste."""
    interpreter, here = Path(sys.executable), Path.cwd()
    if interpreter.is_relative_to(here):
        interpreter = interpreter.relative_to(here)
    return shlex.join([str(interpreter), "-m", module, *arguments])


def log_to_stderr(quiet: bool = False) -> None:
    """Sends the packages' log lines to stderr; `quiet` keeps only warnings and errors. Progress is
    shown if the level INFO is.
    """
    handler = terminal.LogHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("sngpt_jax", "sngpt_kernels"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def expand_json(argv: Sequence[str]) -> list[str]:
    """`argv` with `--json -` for a `--json` without a value."""
    expanded: list[str] = []
    for argument, following in zip_longest(argv, argv[1:], fillvalue="--"):
        bare = argument == "--json" and following.startswith("--")
        expanded += [argument, "-"] if bare else [argument]
    return expanded
