"""A search for the block sizes that make an operation's Pallas Triton kernels fastest here.

It starts at the heuristic's sizes and moves to a faster neighbour until there is none. The sizes
found and the fastest implementation go into the operation's table for this device, which
`dispatch.tuned` reads.
"""

import contextlib
import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from sngpt_kernels import dispatch
from sngpt_kernels.case import Case

from sngpt_jax.ahead import programs, targets
from sngpt_jax.ahead.cases import select
from sngpt_jax.base import cli
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.bench import harness
from sngpt_jax.bench.arguments import TuneArguments

Config = dict[str, Any]  # integers, and dictionaries of integers

ROUNDS = 4
GAIN = 0.98  # a faster configuration takes at most this share of the time; the rest is noise
TOLERANCE = 1e-2  # largest rms error; rounding in another order changes less
LARGEST, LARGEST_BLOCK = {"warps": 16, "stages": 5}, 512


class Trial(dict[str, Any]):
    """A table that answers every key with one configuration and keeps the keys."""

    def __init__(self, config: Config | None) -> None:
        self.asked: set[str] = set()
        self.config = config

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return {"config": self.config} if self.config else default


@contextlib.contextmanager
def trying(operation: str, config: Config | None) -> Iterator[Trial]:
    """Inside, newly traced code finds a `Trial` in place of the operation's table."""
    tables, trial = dispatch.tuned, Trial(config)

    def lookup(package: str, kind: str) -> dict[str, Any]:
        return trial if package == f"sngpt_kernels.{operation}" else tables(package, kind)

    dispatch.tuned = lookup  # type: ignore[assignment]  # only in this process
    try:
        yield trial
    finally:
        dispatch.tuned = tables


def heuristic(operation: str, case: Case) -> Config:
    """The sizes that the operation's kernels take without a table."""
    first = case.abstract()[0]
    config = importlib.import_module(f"sngpt_kernels.{operation}.pallas_triton").Config
    width, by_dtype = first.shape[-1:], (first.dtype, first.shape[-1])
    arguments = {"xsa": by_dtype, "stream": width}
    return dataclasses.asdict(config.heuristic(*arguments.get(operation, ())))


def neighbours(config: Config) -> Iterator[Config]:
    """The configurations with one size doubled or halved, or one stage more or less."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from ({**config, name: changed} for changed in neighbours(value))
            continue
        kind = name.rpartition("_")[2]
        others = (value + 1, value - 1) if kind == "stages" else (2 * value, value // 2)
        most = LARGEST.get(kind, LARGEST_BLOCK)
        yield from ({**config, name: other} for other in others if 1 <= other <= most)


def search(start: Config, seconds: Callable[[Config], float]) -> tuple[Config, float]:
    """The first configuration without a faster neighbour on the way from `start`, and its time."""
    best, least, tried = start, seconds(start), [start]
    while True:
        for config in neighbours(best):
            if config not in tried:
                tried.append(config)
                if (taken := seconds(config)) < GAIN * least:
                    best, least = config, taken
                    break
        else:
            return best, least


def table_key(operation: str, case: Case) -> str:
    """The key that the kernels look up. Raises CannotServe if they do not run here."""
    with trying(operation, None) as trial:
        jax.eval_shape(programs.function(case, "pallas_triton", "forward"), *case.abstract())
    (key,) = trial.asked
    return key


def tune(operation: str, case: Case) -> dict[str, Any]:
    """The table's entry for such arguments: the sizes found, and the fastest implementation."""
    target = targets.of_kind(jax.devices()[0].device_kind)
    sets = harness.argument_sets(case, "forward_backward", target)
    arguments = harness.argument_sets(case, "forward_backward", None)(ROUNDS)[0]
    start = heuristic(operation, case)

    def function(implementation: str) -> Callable[..., Any]:
        return jax.jit(programs.function(case, implementation, "forward_backward"))

    def median(timed: Callable[..., Any]) -> float:
        return harness.time_calls(timed, sets, ROUNDS)[0][1]

    with trying(operation, start):
        expected = jax.tree.leaves(function("pallas_triton")(*arguments))

    def seconds(config: Config) -> float:
        jax.clear_caches()  # programs traced with other sizes
        taken, kernels = math.inf, function("pallas_triton")
        # sizes that do not compile or do not fit
        with trying(operation, config), contextlib.suppress(Exception):
            pairs = zip(jax.tree.leaves(kernels(*arguments)), expected, strict=True)
            if all(harness.errors(*pair)["rms"] < TOLERANCE for pair in pairs):
                taken = median(kernels)
        cli.progress(f"{operation} {case.name}: {1e6 * taken:,.1f} µs with {config}")
        return taken

    config, least = search(start, seconds)
    fastest = {"pallas_triton": least}
    for other in set(case.implementations) - fastest.keys():
        with contextlib.suppress(Exception):  # one that does not run here is not the fastest
            fastest[other] = median(function(other))
    return {"implementation": min(fastest, key=fastest.__getitem__), "config": config}


def write_entry(operation: str, kind: str, key: str, entry: dict[str, Any]) -> Path:
    """Adds the entry to the operation's table for such devices. Returns the table's path."""
    package = importlib.import_module(f"sngpt_kernels.{operation}")
    path = Path(package.__path__[0], "tuned", dispatch.table_name(kind))
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = json.dumps({**table, key: entry}, indent=2, sort_keys=True)
    write_text_atomic(path, text + "\n")
    return path


def tune_all(cases: Sequence[tuple[str, Case]]) -> dict[str, dict[str, Any]]:
    """Tunes every case that runs here and writes its entry. Returns the entries by operation."""
    done: dict[str, dict[str, Any]] = {}
    # If several cases have one entry, the largest case decides.
    for operation, case in sorted(cases, key=lambda pair: -pair[1].forward.bytes):
        title = f"{operation} {case.name}"
        try:
            key = table_key(operation, case)
        except dispatch.CannotServe as reason:
            cli.progress(f"{title}: not tuned: {reason}")
            continue
        if key not in done.setdefault(operation, {}):
            entry = done[operation][key] = tune(operation, case)
            path = write_entry(operation, jax.devices()[0].device_kind, key, entry)
            cli.progress(f"{title}: {key} in {path}: {entry}")
    return done


def measure(arguments: TuneArguments, say: harness.Say) -> dict[str, Any]:
    """The tables' new entries."""
    return harness.environment() | {"entries": tune_all(select(arguments))}
