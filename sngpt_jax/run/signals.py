"""Signals that stop a run between two of its steps."""

import contextlib
import signal
import sys
from types import FrameType

from sngpt_jax.base.errors import EXIT_SIGHUP, EXIT_SIGINT, EXIT_SIGTERM

# by a signal's number; SIGHUP means that the terminal has been closed
EXIT_STATUS: dict[int, int] = {
    signal.SIGINT: EXIT_SIGINT,
    signal.SIGTERM: EXIT_SIGTERM,
    signal.SIGHUP: EXIT_SIGHUP,
}


class StopSignals:
    """Inside the context, a first SIGINT, SIGTERM or SIGHUP is noted, so that a step can end. A
    second one kills. Signals that the process was started to ignore (nohup) stay ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        message = f"{self.received.name}: stopping and saving; a second one ends at once"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(message, file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def __enter__(self) -> "StopSignals":
        for number in map(signal.Signals, EXIT_STATUS):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
