"""Finds the block sizes with which an operation's Pallas Triton kernels are fastest on the device
at hand.

From the heuristic's sizes it goes on to whichever neighbour is faster, one size doubled or halved
at a time, until there is none. What it finds, and which implementation is fastest then, goes into
the operation's table for that device, which `dispatch.tuned` reads.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from sngpt_kernels import dispatch
from sngpt_kernels.case import Case

from sngpt_jax.ahead import programs, targets
from sngpt_jax.base import cli
from sngpt_jax.bench import timing

Config = dict[str, Any]  # whole numbers, and of such

ROUNDS = 4
GAIN = 0.98  # of the time so far: what is less than noise
TOLERANCE = 1e-2  # in rms errors: what rounding in another order changes
LARGEST = {"num_warps": 16, "num_stages": 5}  # others: 512


class Trial(dict[str, Any]):
    """A table that answers whatever it is asked for with one configuration, and remembers the
    question.
    """

    def __init__(self, config: Config | None) -> None:
        self.asked: set[str] = set()
        self.config = config

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return {"config": self.config} if self.config else default


@contextlib.contextmanager
def trying(operation: str, trial: Trial) -> Iterator[Trial]:
    """Inside, what is traced anew finds `trial` in place of the operation's table."""
    tables = dispatch.tuned

    def lookup(package: str, kind: str) -> dict[str, Any]:
        return trial if package == f"sngpt_kernels.{operation}" else tables(package, kind)

    dispatch.tuned = lookup  # type: ignore[assignment]  # of this process alone, which times nothing else
    try:
        yield trial
    finally:
        dispatch.tuned = tables


def heuristic(operation: str, case: Case) -> Config:
    """The sizes that the operation's kernels take where no table says others."""
    first = case.abstract()[0]
    config = importlib.import_module(f"sngpt_kernels.{operation}.pallas_triton").Config
    arguments = {"cayley": first.shape[-1:], "xsa": (first.dtype, first.shape[-1])}
    return dataclasses.asdict(config.heuristic(*arguments[operation]))


def neighbours(config: Config) -> Iterator[Config]:
    """The configurations with one size doubled or halved; a number of stages goes up or down by
    one.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            yield from ({**config, name: changed} for changed in neighbours(value))
            continue
        largest = next(
            (size for suffix, size in LARGEST.items() if name.endswith(suffix.removeprefix("num"))),
            512,
        )
        for other in (value + 1, value - 1) if name.endswith("stages") else (2 * value, value // 2):
            if 1 <= other <= largest:
                yield {**config, name: other}


def search(start: Config, seconds: Callable[[Config], float]) -> tuple[Config, float]:
    """The first configuration without a faster neighbour on the way down from `start`, and its
    time.
    """
    best, least, tried = start, seconds(start), [start]
    improved = True
    while improved:
        improved = False
        for config in neighbours(best):
            if config in tried:
                continue
            tried.append(config)
            if (taken := seconds(config)) < GAIN * least:
                best, least, improved = config, taken, True
                break
    return best, least


def table_key(operation: str, case: Case) -> str:
    """The entry of the table that the kernels ask for. Raises CannotServe where they do not run
    here.
    """
    with trying(operation, Trial(None)) as trial:
        jax.eval_shape(programs.function(case, "pallas_triton", "forward"), *case.abstract())
    (key,) = trial.asked
    return key


def tune(operation: str, case: Case) -> dict[str, Any]:
    """The table's entry for such arguments: the sizes found, and the fastest implementation."""
    target = targets.of_kind(jax.devices()[0].device_kind)
    sets = timing.argument_sets(case, "forward_backward", target)
    arguments = timing.argument_sets(case, "forward_backward", None)(ROUNDS)[0]
    start = heuristic(operation, case)
    with trying(operation, Trial(start)):
        expected = jax.jit(programs.function(case, "pallas_triton", "forward_backward"))(*arguments)

    def seconds(config: Config) -> float:
        jax.clear_caches()  # nothing is to be left of what was traced with other sizes
        with trying(operation, Trial(config)):
            function = jax.jit(programs.function(case, "pallas_triton", "forward_backward"))
            try:
                pairs = zip(
                    jax.tree.leaves(function(*arguments)), jax.tree.leaves(expected), strict=True
                )
                if any(not timing.errors(*pair)["rms"] < TOLERANCE for pair in pairs):
                    return math.inf
                taken = timing.time_calls(function, sets, ROUNDS).median
            except Exception:  # sizes that do not compile or do not fit
                taken = math.inf
        cli.progress(f"{operation} {case.name}: {1e6 * taken:,.1f} µs with {config}")
        return taken

    config, least = search(start, seconds)
    fastest = {"pallas_triton": least}
    for other in case.implementations:
        if other != "pallas_triton":
            function = jax.jit(programs.function(case, other, "forward_backward"))
            with contextlib.suppress(dispatch.CannotServe):
                fastest[other] = timing.time_calls(function, sets, ROUNDS).median
    return {"implementation": min(fastest, key=fastest.__getitem__), "config": config}


def write_entry(operation: str, kind: str, key: str, entry: dict[str, Any]) -> Path:
    """Adds the entry to the operation's table for devices of that kind; returns the table's path."""
    package = importlib.import_module(f"sngpt_kernels.{operation}")
    path = Path(
        package.__path__[0], "tuned", re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json"
    )
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({**table, key: entry}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return path


def tune_all(cases: Sequence[tuple[str, Case]]) -> None:
    """Tunes for every case and writes the tables, one entry after the other. Says why where that
    cannot be.
    """
    done: set[tuple[str, str]] = set()
    # of the cases of one entry the largest decides
    largest_first = sorted(cases, key=lambda pair: -pair[1].forward.bytes)
    for operation, case in largest_first:
        try:
            key = table_key(operation, case)
        except dispatch.CannotServe as reason:
            cli.progress(f"{operation} {case.name}: not tuned: {reason}")
            continue
        if (operation, key) in done:
            continue
        entry = tune(operation, case)
        done.add((operation, key))
        path = write_entry(operation, jax.devices()[0].device_kind, key, entry)
        cli.progress(f"{operation} {case.name}: {key} in {path}: {entry}")
