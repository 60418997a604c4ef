"""The loop's edges to the world: the clock, signals, the profiler."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import jax

from sngpt_jax.cli import EXIT_SIGINT, EXIT_SIGTERM


class Stopwatch:
    """Seconds of training: runs from its making, leaves out what happens inside `paused()`."""

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        """`seconds` were spent before; `clock` returns seconds that never run backwards."""
        self._clock = clock
        self._start = clock() - seconds

    @property
    def seconds(self) -> float:
        return self._clock() - self._start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = self._clock()
        try:
            yield
        finally:
            self._start += self._clock() - before


EXIT_STATUS = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


class StopSignals:
    """While entered, the first SIGINT or SIGTERM is noted instead of killing, so that a step can end; a second one kills."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def exit_status(self) -> int:
        """The exit status that belongs to the signal received; 0 without one."""
        return EXIT_STATUS[self.received] if self.received else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in EXIT_STATUS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()


class ProfileWindow:
    """Traces steps first … last into `directory` with jax.profiler, for xprof; nothing where `window` is None."""

    def __init__(self, directory: Path, window: tuple[int, int] | None) -> None:
        self._directory, self._window, self._tracing = directory, window, False

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        if self._window and not self._tracing and self._window[0] <= step <= self._window[1]:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True

    def after(self, step: int) -> None:
        """To be called when the results of `step` have been read."""
        if self._window and step >= self._window[1]:
            self.close()

    def close(self) -> None:
        """Ends a trace that is running, and writes it."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self._window = False, None
