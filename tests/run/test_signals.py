"""The clock without its pauses, and signals that wait for a step's end."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from sngpt_jax.run.checkpoint import forgive_late_callbacks
from sngpt_jax.run.clock import Stopwatch
from sngpt_jax.run.profiler import Profiler
from sngpt_jax.run.signals import EXIT_STATUS, StopSignals
from tests.tiny_run import ROOT, environment


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
    monkeypatch.setattr(
        sys, "unraisablehook", lambda unraisable: heard.append(str(unraisable.exc_value))
    )
    forgive_late_callbacks()
    for error in (
        RuntimeError("Event loop is closed"),
        RuntimeError("another"),
        ValueError("Event loop is closed"),
    ):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))
    assert heard == ["another", "Event loop is closed"]


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def traced(monkeypatch, folder, window, first, last):
    """Starts, stops and steps in order, as the loop drives the profiler."""
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    profiler = Profiler(folder, window)
    for step in range(first, last + 1):
        if profiler.begins_with(step):
            profiler.start()
        calls.append(step)
        if profiler.ends_with(step):
            profiler.stop()
    profiler.stop()
    return calls


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
    assert traced(monkeypatch, tmp_path, window, first, 5) == want


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
from sngpt_jax.training.compiler import keep_working_memory
if sys.argv[1] == "kept":
    keep_working_memory()
program = jax.jit(lambda x: jnp.sum(x @ x.T))  # of a product that takes 64 MB
x = jnp.ones((1 << 12, 16))
for _ in range(3):
    program(x).block_until_ready()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # a system short of memory takes some pages back now and then
"""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="glibc's heap",
)
@pytest.mark.skipif(
    HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text(), reason="huge pages: few faults"
)
def test_a_program_finds_the_memory_of_the_call_before():
    def page_faults(how):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, how],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert page_faults("kept") < 1000
    if jax.__version_info__ < (0, 11):  # 0.12 finds it by itself
        assert page_faults("as jax does") > 10_000
