"""What the package's commands share: what `kernels.commands` has, and the log, options and command lines of their own."""

import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kernels import commands
from kernels.commands import (
    EXIT_SIGINT,
    EXIT_USER_ERROR,
    UserError,
    check_json,
    check_writable,
    drop_output,
    escape_controls,
    write_bytes_atomic,
    write_json,
    write_text_atomic,
)
from sngpt_jax import terminal

__all__ = [
    "EXIT_LOST",
    "EXIT_NON_FINITE",
    "EXIT_OVER_LIMIT",
    "EXIT_SIGHUP",
    "EXIT_SIGINT",
    "EXIT_SIGTERM",
    "EXIT_USER_ERROR",
    "UserError",
    "check_json",
    "check_writable",
    "command",
    "drop_output",
    "escape_controls",
    "expand_json",
    "log_to_stderr",
    "run",
    "write_bytes_atomic",
    "write_json",
    "write_text_atomic",
]

EXIT_NON_FINITE = 3
EXIT_OVER_LIMIT = 4
EXIT_LOST = 5  # another process of the same job is gone
EXIT_SIGHUP = 129
EXIT_SIGTERM = 143


def command(module: str, *arguments: str) -> str:
    """A command line for a person to paste: `module` run by this interpreter, which may not be the one named python."""
    interpreter = Path(sys.executable)
    if interpreter.is_relative_to(Path.cwd()):
        interpreter = interpreter.relative_to(Path.cwd())
    return shlex.join([str(interpreter), "-m", module, *arguments])


def run(main: Callable[[Sequence[str]], int]) -> None:
    """`kernels.commands.run`, whose error does not stand behind a line of progress."""

    def to_the_end(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        finally:
            terminal.clear()

    commands.run(to_the_end)


def log_to_stderr(quiet: bool = False) -> None:
    """Sends the packages' log lines to stderr as they are; stdout is for results. `quiet`: warnings and errors alone.

    Progress is shown where lines of the level INFO are.
    """
    handler = terminal.LogHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("sngpt_jax", "kernels"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


def expand_json(argv: Sequence[str]) -> list[str]:
    """`argv` with a bare `--json` written as `--json -`, so that the option's path may be left out."""
    expanded: list[str] = []
    for i, argument in enumerate(argv):
        expanded.append(argument)
        if argument == "--json" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            expanded.append("-")
    return expanded
