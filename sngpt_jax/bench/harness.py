"""The parts that the benchmarks share: clocks, quartiles, errors, tables, a result's header."""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from sngpt_kernels.case import Case

from sngpt_jax.ahead import programs
from sngpt_jax.ahead.targets import Target
from sngpt_jax.run.console import progress_reporter

T = TypeVar("T")
Say = Callable[[str], None]  # prints one line for a person
Arguments = tuple[jax.Array, ...]

SETS_BYTES, MOST_SETS = 8 * 2**30, 512  # the most arguments of a round
ROUND_SECONDS = 0.05
ENQUEUED = 4  # calls that a queue takes without waiting for the device


def environment() -> dict[str, Any]:
    """The header of a result: the device, the processor and the version of jax."""
    device = jax.devices()[0]
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "platform": device.platform,
        "platform_version": " ".join(device.client.platform_version.split()),
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "jax": jax.__version__,
    }


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result of `work`, and its seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def in_turn(works: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """The results of every work over so many rounds.

    The works take turns in each round, so that a busy moment of the machine falls on all of them.
    """
    found: dict[str, list[T]] = {name: [] for name in works}
    progress = progress_reporter("rounds")
    for turn in range(rounds):
        for name, work in works.items():
            found[name].append(work())
        progress(turn + 1, rounds)
    return found


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = np.quantile(list(values), [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def table_row(cells: Sequence[str]) -> str:
    """One row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def table_head(titles: Sequence[str]) -> str:
    """The first two lines of a table in Markdown."""
    return f"{table_row(titles)}\n|{'---|' * len(titles)}"


@functools.cache
def _maker(case: Case, which: str) -> Callable[[jax.Array], Arguments]:
    """Makes the arguments of `programs.function` from a key."""
    shapes = programs.abstract_arguments(case, which)

    @jax.jit
    def make(key: jax.Array) -> Arguments:
        arguments = case.make(key)
        if which == "forward":
            return arguments
        of_output = jax.random.fold_in(key, 1)
        return (jax.random.normal(of_output, shapes[0].shape, shapes[0].dtype), *arguments)

    return make


def argument_sets(
    case: Case, which: str, target: Target | None
) -> Callable[[int], list[Arguments]]:
    """A function that makes the argument sets of round i.

    They are fresh and random, and together several times as large as the device's cache.
    """
    size = programs.argument_bytes(case, which)
    wanted = math.ceil(4 * target.l2 / size) if target else 0
    count = max(2, min(MOST_SETS, wanted, SETS_BYTES // size))

    def make(i: int) -> list[Arguments]:
        # "rbg" compiles and runs in a fraction of the default generator's time
        keys = [jax.random.key(i * count + j, impl="rbg") for j in range(count)]
        return [_maker(case, which)(key) for key in keys]

    return make


def time_calls(
    function: Callable[..., Any], fresh: Callable[[int], Sequence[Arguments]], rounds: int
) -> tuple[tuple[float, float, float], bool]:
    """The `quartiles` of a jitted function's seconds per call, and whether the host was the limit.

    A round enqueues call after call and waits once at its end, so the device does not wait for the
    host between calls. `fresh(i)` makes the argument sets of round i, which its calls take in turn.
    """
    means: list[float] = []
    host, calls = math.inf, 0  # the host's time to enqueue a call, and the calls of a round
    for i in range(rounds):
        sets = jax.block_until_ready(fresh(i))
        # The first round compiles here.
        jax.block_until_ready([function(*arguments) for arguments in sets[:2]])
        start = time.perf_counter()
        results = [function(*sets[call % len(sets)]) for call in range(ENQUEUED)]
        host = min(host, (time.perf_counter() - start) / ENQUEUED)
        jax.block_until_ready(results)
        if not calls:  # fill a round
            taken = time.perf_counter() - start
            calls = max(len(sets), math.ceil(ROUND_SECONDS * ENQUEUED / taken))
        del results
        start = time.perf_counter()
        for call in range(calls):
            result = function(*sets[call % len(sets)])
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / calls)
    found = quartiles(means)
    return found, host > 0.8 * found[1]


def errors(value: Any, expected: Any) -> dict[str, float]:
    """The errors "max" and "rms" in units of the root mean square of `expected`."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    scale = math.sqrt(np.mean(expected**2)) or 1.0
    difference = (value - expected) / scale
    return {"max": float(np.abs(difference).max()), "rms": math.sqrt(np.mean(difference**2))}
