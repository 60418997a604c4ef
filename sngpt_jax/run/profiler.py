"""Traces of a run's steps for jax's profiler."""

from pathlib import Path

import jax


class Profiler:
    """Traces steps first … last, counted from 1, into `directory` for xprof; nothing where
    `window` is None.
    """

    def __init__(self, directory: Path, window: tuple[int, int] | None) -> None:
        self._directory, self._window, self._tracing = directory, window, False

    def begins_with(self, step: int) -> bool:
        """Whether a trace is to be started before `step` is dispatched; also within the window,
        where a resumed run starts.
        """
        return (
            self._window is not None
            and not self._tracing
            and self._window[0] <= step <= self._window[1]
        )

    def ends_with(self, step: int) -> bool:
        """Whether the trace is to be stopped once `step` has ended."""
        return self._window is not None and self._tracing and step == self._window[1]

    def start(self) -> None:
        jax.profiler.start_trace(str(self._directory))
        self._tracing = True

    def stop(self) -> None:
        """Ends a trace that is running, and writes it."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self._window = False, None
