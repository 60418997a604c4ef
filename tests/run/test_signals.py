"""The clock without its pauses, signals that wait for a step's end, and the profiler."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest

from sngpt_jax.run.checkpoint import forgive_late_callbacks
from sngpt_jax.run.clock import Stopwatch
from sngpt_jax.run.profiler import Profiler
from sngpt_jax.run.signals import EXIT_STATUS, StopSignals


def test_the_stopwatch_leaves_out_pauses():
    now = [100.0]
    watch = Stopwatch(5.0, clock=lambda: now[0])
    now[0] += 2
    with watch.paused():
        now[0] += 50
        assert watch.seconds == pytest.approx(7.0)
    now[0] += 1
    assert watch.seconds == pytest.approx(8.0)
    with pytest.raises(KeyError), watch.paused():
        now[0] += 9
        raise KeyError
    assert watch.seconds == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_the_first_signal_is_noted_and_the_second_kills(number, status):
    killed = []
    before = signal.signal(number, lambda *_: killed.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.received == number
            assert EXIT_STATUS[signals.received] == status
            assert not killed
            os.kill(os.getpid(), number)
            assert killed == [number]
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_late_callbacks_of_a_failed_save_are_not_heard(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: heard.append(unraisable))
    forgive_late_callbacks()
    closed = "Event loop is closed"
    for error in (RuntimeError(closed), RuntimeError("another"), ValueError(closed)):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [str(unraisable.exc_value) for unraisable in heard] == ["another", closed]


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("window", "first", "want"),
    [
        (None, 1, [1, 2, 3, 4, 5]),
        ((2, 3), 1, [1, "start", 2, 3, "stop", 4, 5]),
        ((4, 9), 1, [1, 2, 3, "start", 4, 5, "stop"]),
        ((2, 4), 3, ["start", 3, 4, "stop", 5]),
        ((1, 2), 3, [3, 4, 5]),
    ],
)
def test_the_profiler_runs_from_first_to_last(monkeypatch, tmp_path, window, first, want):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(tmp_path, window)
    for step in range(first, 6):  # as the loop drives it
        if profiler.begins_with(step):
            profiler.start()
        calls.append(step)
        if profiler.ends_with(step):
            profiler.stop()
    profiler.stop()
    assert calls == want
