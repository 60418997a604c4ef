"""The time that a device takes for one call of a program, and how far off its results are."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from sngpt_kernels.case import Case

from sngpt_jax.ahead import programs
from sngpt_jax.ahead.targets import Target

SETS_BYTES, MOST_SETS = 8 * 2**30, 512  # of a round's arguments, at most
ROUND_SECONDS = 0.05
ENQUEUED = 4  # calls that a queue takes without waiting for the device

Arguments = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    rounds: tuple[float, ...]  # the mean of each round
    host: float  # that the host takes to enqueue one

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.rounds, [0.25, 0.75])
        return float(low), float(high)

    @property
    def is_host_bound(self) -> bool:
        """Whether the device waited for calls to do, so that it may be faster than what was
        measured.
        """
        return self.host > 0.8 * self.median


@functools.cache
def _maker(case: Case, which: str) -> Callable[[jax.Array], Arguments]:
    """Makes what `programs.function` takes, from a key."""
    shapes = programs.abstract_arguments(case, which)

    @jax.jit
    def make(key: jax.Array) -> Arguments:
        arguments = case.make(key)
        if which == "forward":
            return arguments
        return (
            jax.random.normal(jax.random.fold_in(key, 1), shapes[0].shape, shapes[0].dtype),
            *arguments,
        )

    return make


def argument_sets(
    case: Case, which: str, target: Target | None
) -> Callable[[int], list[Arguments]]:
    """Makes the argument sets of a round: fresh random ones, together several times as large as
    the device's cache.
    """
    size = sum(
        math.prod(a.shape) * a.dtype.itemsize for a in programs.abstract_arguments(case, which)
    )
    cache = target.l2 if target else 0
    count = max(2, min(MOST_SETS, math.ceil(4 * cache / size), SETS_BYTES // size))
    # This generator compiles and runs in a fraction of the default one's time.
    return lambda i: [
        _maker(case, which)(jax.random.key(i * count + j, impl="rbg")) for j in range(count)
    ]


def time_calls(
    function: Callable[..., Any], fresh: Callable[[int], Sequence[Arguments]], rounds: int
) -> Timing:
    """Times a jitted function.

    A round enqueues call after call and waits once, at its end: between calls the device does not
    wait for the host. `fresh(i)` makes the arguments of round i; its calls take them in turn, so
    that together they should be larger than the cache.
    """
    means: list[float] = []
    host, calls = math.inf, 0
    for i in range(rounds):
        sets = jax.block_until_ready(fresh(i))
        # compiles, the first time
        jax.block_until_ready([function(*arguments) for arguments in sets[:2]])
        start = time.perf_counter()
        results = [function(*sets[call % len(sets)]) for call in range(ENQUEUED)]
        host = min(host, (time.perf_counter() - start) / ENQUEUED)
        jax.block_until_ready(results)
        if not calls:  # as many as fill a round
            calls = max(
                len(sets), math.ceil(ROUND_SECONDS * ENQUEUED / (time.perf_counter() - start))
            )
        del results
        start = time.perf_counter()
        for call in range(calls):
            result = function(*sets[call % len(sets)])
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / calls)
    return Timing(tuple(means), host)


def errors(value: Any, expected: Any) -> dict[str, float]:
    """The errors "max" and "rms" of a value, both in units of the root mean square of what is
    expected.
    """
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    scale = math.sqrt(np.mean(expected**2)) or 1.0
    difference = value - expected
    return {
        "max": float(np.abs(difference).max()) / scale,
        "rms": math.sqrt(np.mean(difference**2)) / scale,
    }
