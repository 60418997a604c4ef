"""What every command shares: one-line errors with exit status 2, and stable JSON output.

A command's `main(argv)` returns its exit status and raises `UserError` for a mistake that its user can mend;
`run` turns that into one line on stderr. Anything else that escapes is a bug and shows its traceback.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
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


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader, or a run killed half way, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(value: Any, destination: str | None) -> None:
    """Prints `value` as one JSON object on stdout (`destination` "-"), or writes it to the file `destination` names."""
    text = json.dumps(value, indent=2, allow_nan=False)
    if destination == "-":
        print(text)
    elif destination:
        write_text_atomic(Path(destination), text + "\n")
