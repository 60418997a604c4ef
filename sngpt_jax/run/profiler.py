"""Traces of a run's steps for jax's profiler."""

from pathlib import Path

import jax


class Profiler:
    """Traces the steps first … last of `window`, if it is not None, into `directory` for xprof."""

    def __init__(self, directory: Path, window: tuple[int, int] | None) -> None:
        self._directory, self._window, self._tracing = directory, window, False

    def begins_with(self, step: int) -> bool:
        """Whether to start a trace before `step`: a resumed run may start within the window."""
        if self._window is None or self._tracing:
            return False
        return self._window[0] <= step <= self._window[1]

    def ends_with(self, step: int) -> bool:
        """Whether to stop the trace once `step` has ended."""
        return self._window is not None and self._tracing and step == self._window[1]

    def start(self) -> None:
        """Starts a trace."""
        jax.profiler.start_trace(str(self._directory))
        self._tracing = True

    def stop(self) -> None:
        """Writes the trace, if one is running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self._window = False, None
