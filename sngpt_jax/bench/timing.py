"""The time of a program's calls on the device, and the errors of its results."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from sngpt_kernels.case import Case

from sngpt_jax.ahead import programs
from sngpt_jax.ahead.targets import Target
from sngpt_jax.bench import harness

SETS_BYTES, MOST_SETS = 8 * 2**30, 512  # the most arguments of a round
ROUND_SECONDS = 0.05
ENQUEUED = 4  # calls that a queue takes without waiting for the device

Arguments = tuple[jax.Array, ...]


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    rounds: tuple[float, ...]  # the mean of each round
    host: float  # the host's time to enqueue a call

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile of the rounds."""
        return harness.quartiles(self.rounds)

    @property
    def is_host_bound(self) -> bool:
        """Whether the device waited for calls, so that it may be faster than measured."""
        return self.host > 0.8 * self.quartiles[1]


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
    size = sum(
        math.prod(a.shape) * a.dtype.itemsize for a in programs.abstract_arguments(case, which)
    )
    cache = target.l2 if target else 0
    count = max(2, min(MOST_SETS, math.ceil(4 * cache / size), SETS_BYTES // size))

    def make(i: int) -> list[Arguments]:
        # "rbg" compiles and runs in a fraction of the default generator's time
        keys = [jax.random.key(i * count + j, impl="rbg") for j in range(count)]
        return [_maker(case, which)(key) for key in keys]

    return make


def time_calls(
    function: Callable[..., Any], fresh: Callable[[int], Sequence[Arguments]], rounds: int
) -> Timing:
    """Times a jitted function.

    A round enqueues call after call and waits once at its end, so the device does not wait for the
    host between calls. `fresh(i)` makes the argument sets of round i, which its calls take in turn.
    The sets together should be larger than the cache.
    """
    means: list[float] = []
    host, calls = math.inf, 0
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
    return Timing(tuple(means), host)


def errors(value: Any, expected: Any) -> dict[str, float]:
    """The errors "max" and "rms" in units of the root mean square of `expected`."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    scale = math.sqrt(np.mean(expected**2)) or 1.0
    difference = value - expected
    return {
        "max": float(np.abs(difference).max()) / scale,
        "rms": math.sqrt(np.mean(difference**2)) / scale,
    }
