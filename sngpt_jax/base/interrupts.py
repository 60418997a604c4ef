"""Ctrl-C before a command's `main` has begun: one word instead of a traceback."""

import os
import signal
import sys
from types import FrameType
from typing import Any

from sngpt_jax.base.errors import EXIT_SIGINT


def end_quietly(number: int, frame: FrameType | None) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # the cursor, which a progress bar hides
        sys.stderr.flush()
    os._exit(EXIT_SIGINT)


def heed_interrupts(unraisable: Any) -> None:
    """For `sys.unraisablehook`: Ctrl-C while the interpreter is in a callback of its own, where
    the exception goes nowhere.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        end_quietly(signal.SIGINT, None)
    sys.__unraisablehook__(unraisable)


def expect_interrupts() -> None:
    """Until `run` begins, Ctrl-C ends the process with a word instead of a traceback.

    To be called as a package is imported: nothing where that is not by `python -m`, whose modules
    take seconds to import.
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_quietly)
