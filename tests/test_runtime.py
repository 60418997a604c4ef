"""The clock without its pauses, and signals that wait for a step's end."""

import os
import signal

import pytest

from sngpt_jax.runtime import ProfileWindow, StopSignals, Stopwatch


def test_the_stopwatch_leaves_out_pauses():
    now = [100.0]
    watch = Stopwatch(5.0, clock=lambda: now[0])
    now[0] += 2
    with watch.paused():
        now[0] += 50
    now[0] += 1
    assert watch.seconds == pytest.approx(8.0)
    with pytest.raises(KeyError), watch.paused():
        now[0] += 9
        raise KeyError
    assert watch.seconds == pytest.approx(8.0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_the_second_kills(number, status):
    killed = []
    before = signal.signal(number, lambda *_: killed.append(number))
    try:
        with StopSignals() as signals:
            assert signals.exit_status == 0
            os.kill(os.getpid(), number)
            assert signals.received == number
            assert signals.exit_status == status
            assert not killed
            os.kill(os.getpid(), number)
            assert killed == [number]
    finally:
        signal.signal(number, before)


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_profiler_runs_from_first_to_last(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda path: calls.append(("start", path)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(("stop",)))
    window = ProfileWindow(tmp_path, (2, 3))
    for step in range(6):
        window.before(step)
        calls.append(step)
        window.after(step)
    window.close()
    assert calls == [0, 1, ("start", str(tmp_path)), 2, 3, ("stop",), 4, 5]
    calls.clear()
    window = ProfileWindow(tmp_path, (2, 30))
    window.before(2)
    window.close()
    assert calls == [("start", str(tmp_path)), ("stop",)]
