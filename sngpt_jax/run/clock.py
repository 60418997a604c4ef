"""The clock of a run's training time."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Stopwatch:
    """Seconds of training: runs from its making, leaves out what happens inside `paused()`."""

    def __init__(
        self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`seconds` were spent before; `clock` returns seconds that never run backwards."""
        self._clock = clock
        self._start = clock() - seconds
        self._paused_at: float | None = None

    @property
    def seconds(self) -> float:
        now = self._clock() if self._paused_at is None else self._paused_at
        return now - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stands still inside; not to be nested."""
        self._paused_at = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - self._paused_at
            self._paused_at = None
