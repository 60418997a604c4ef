"""Ctrl-C before a command's `main` has begun: one word instead of a traceback."""

import os
import signal
import sys
from types import FrameType
from typing import Any

from sngpt_jax.base.errors import EXIT_SIGINT


def end_quietly(number: int, frame: FrameType | None) -> None:
    """A signal handler that prints one word and ends the process."""
    print("interrupted", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # shows the cursor, which a progress bar hides
        sys.stderr.flush()
    os._exit(EXIT_SIGINT)


def heed_interrupts(unraisable: Any) -> None:
    """A `sys.unraisablehook`: the interpreter drops an exception that a callback of it raises."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        end_quietly(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)


def expect_interrupts() -> None:
    """Makes Ctrl-C end the process so until `cli.run` begins, under `python -m` alone."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
