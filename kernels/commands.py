"""What the commands of this package share: their operations' cases, one-line errors, progress and stable JSON."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernels.case import Case

OPERATIONS = ("cayley", "xsa")
EXIT_USER_ERROR, EXIT_SIGINT = 2, 130


class UserError(Exception):
    """A mistake of the user's: one line that says what was wrong and what to do."""


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main` on the command line's arguments and exits with its status: 2 for a `UserError`, 130 when interrupted."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_SIGINT
    except BrokenPipeError:  # `… | head` closed our stdout: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def select(operations: Sequence[str], name: str | None) -> list[tuple[str, Case]]:
    """(operation, case) of all cases of these operations, of all where there are none; only the one called `name`, if given.

    Raises `UserError` where there is no such operation or case.
    """
    for operation in operations:
        if operation not in OPERATIONS:
            raise UserError(f"there is no operation {operation!r}; expected {' or '.join(OPERATIONS)}")
    found = [
        (operation, case)
        for operation in operations or OPERATIONS
        for case in importlib.import_module(f"kernels.{operation}.specs").CASES
    ]
    if name is None:
        return found
    if name not in {case.name for _, case in found}:
        raise UserError(f"--case {name}: there is none; expected one of: {', '.join(case.name for _, case in found)}")
    return [(operation, case) for operation, case in found if case.name == name]


def progress(line: str) -> None:
    """One line for whoever waits; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def check_writable(destination: str, option: str) -> None:
    """Raises `UserError` where the file that `option` names could not be written: before the work rather than after it."""
    if destination in ("", "-"):
        return
    path = Path(destination)
    if (
        path.is_dir()
        or not path.absolute().parent.is_dir()
        or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    ):
        raise UserError(f"{option} {destination}: cannot be written; give the path of a file in a folder that there is")


def write_text(text: str, destination: str) -> None:
    """Prints the text ("-"), or writes it to the file that `destination` names; nothing for ""."""
    if destination == "-":
        print(text, flush=True)
    elif destination:
        Path(destination).write_text(text + "\n", encoding="utf-8")


def write_json(value: Any, destination: str) -> None:
    """`write_text` of one JSON object without NaN or infinity."""
    write_text(json.dumps(value, indent=2, allow_nan=False), destination)
