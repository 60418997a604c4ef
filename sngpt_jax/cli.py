"""What every command shares: one-line errors with exit status 2, and stable JSON output.

A command's `main(argv)` returns its exit status and raises `UserError` for a mistake that its user can mend;
`run` turns that into one line on stderr. Anything else that escapes is a bug and shows its traceback.
"""

import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_OVER_LIMIT = 4
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class UserError(Exception):
    """A mistake of the user's: one line that says what was wrong, where, and what to do."""


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main` on the command line's arguments and exits with its status; `UserError` is one line and status 2."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_SIGINT
    except BrokenPipeError:  # `… | head` closed our stdout: not an error of ours, and nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


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


def command(module: str, *arguments: str) -> str:
    """A command line for a person to paste: `module` run by this interpreter, which may not be the one named python."""
    interpreter = Path(sys.executable)
    if interpreter.is_relative_to(Path.cwd()):
        interpreter = interpreter.relative_to(Path.cwd())
    return shlex.join([str(interpreter), "-m", module, *arguments])


def log_to_stderr() -> None:
    """Sends the packages' log lines to stderr as they are; stdout is for results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("sngpt_jax", "kernels"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def expand_json(argv: Sequence[str]) -> list[str]:
    """`argv` with a bare `--json` written as `--json -`, so that the option's path may be left out."""
    expanded: list[str] = []
    for i, argument in enumerate(argv):
        expanded.append(argument)
        if argument == "--json" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            expanded.append("-")
    return expanded


def write_json(value: Any, destination: str | None) -> None:
    """Prints `value` as one JSON object on stdout (`destination` "-"), or writes it to the file `destination` names.

    No `destination`: does nothing. The value holds no NaN or infinity.
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
