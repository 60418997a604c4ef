"""A process's edges to the world: the clock, signals, the profiler, the compilation cache."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import jax

from sngpt_jax.cli import EXIT_SIGHUP, EXIT_SIGINT, EXIT_SIGTERM


class Stopwatch:
    """Seconds of training: runs from its making, leaves out what happens inside `paused()`."""

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
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


# by a signal's number; SIGHUP says that the terminal has been closed
EXIT_STATUS: dict[int, int] = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM, signal.SIGHUP: EXIT_SIGHUP}


class StopSignals:
    """While entered, a first SIGINT, SIGTERM or SIGHUP is noted instead of killing, so that a step can end; a second one kills.

    One that the process was started to ignore, as by nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{self.received.name}: stopping and saving; a second one ends at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def __enter__(self) -> "StopSignals":
        heeded = [number for number in map(signal.Signals, EXIT_STATUS) if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()


class Profiler:
    """Traces steps first … last, counted from 1, into `directory` for xprof; nothing where `window` is None."""

    def __init__(self, directory: Path, window: tuple[int, int] | None) -> None:
        self._directory, self._window, self._tracing = directory, window, False

    def begins_with(self, step: int) -> bool:
        """Whether a trace is to be started before `step` is dispatched; also within the window, where a resumed run starts."""
        return self._window is not None and not self._tracing and self._window[0] <= step <= self._window[1]

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


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` (~ is the home directory) for later processes; empty: keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep_working_memory() -> None:
    """Has a step on the CPU find the memory of the step before; to be called before jax has touched a device.

    XLA allocates a program's temporary arrays at every call, 134 MB for a step of `quickstart`. glibc asks the system for more
    than 32 MB anew each time, and the system clears it, page by page: 37,000 page faults a step, a third of its time. So large
    arrays too come from the heap, nothing of which is given back, and programs run in the thread that calls them: only the
    main thread's heap grows beyond 64 MB. GPUs are not affected, nor are programs for several devices.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if jax.default_backend() == "cpu" else None
    if mallopt is not None:  # glibc, which other systems need not have
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def forgive_late_callbacks() -> None:
    """From here on, a callback into an event loop that was closed prints no traceback.

    A save of which one write fails, as on a full disk, is given up with a line; its other writes end later, in threads of
    tensorstore's, and report to the loop of orbax that waited for them and is gone.
    """
    shown = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            shown(unraisable)

    sys.unraisablehook = hook
