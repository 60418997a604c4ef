"""The parts that the benchmarks share: rounds in turn, quartiles, and the header of a result."""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from sngpt_jax.run.console import progress_reporter

T = TypeVar("T")
Say = Callable[[str], None]  # prints one line for a person


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


def seconds_of(work: Callable[[], object]) -> Callable[[], float]:
    """A function that runs `work` and returns its seconds."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return timed


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


def medians(times: Mapping[str, Iterable[float]]) -> dict[str, float]:
    """The median of each list of times."""
    return {name: quartiles(values)[1] for name, values in times.items()}


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a table in a document."""
    return f"| {' | '.join(cells)} |"


def markdown_head(titles: Sequence[str]) -> str:
    """The first two lines of a table in a document."""
    return f"{markdown_row(titles)}\n|{'---|' * len(titles)}"
