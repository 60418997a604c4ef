"""The clock of a run's training time."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Stopwatch:
    """Seconds of training since it was made, without the time inside `paused()`."""

    def __init__(
        self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`seconds` have passed before."""
        self._clock = clock
        self._start = clock() - seconds
        self._paused_at: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        now = self._clock() if self._paused_at is None else self._paused_at
        return now - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside. Do not nest it."""
        self._paused_at = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - self._paused_at
            self._paused_at = None
