"""What a run directory holds, as far as a report needs it.

Runs of earlier versions are read as well. What is no number where one belongs is left out.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run import environment
from sngpt_jax.run.metrics import read_metrics

LARGEST = 1e38  # float32 holds little more; charts of numbers beyond float64's roots have no axes
MOST_STEPS = 2**53  # as of train.steps
OWN_FILES = ("config.json", "summary.json", "tokenizer.json")


@dataclass(frozen=True)
class Series:
    """A quantity over optimizer steps, float64 [N]: `steps` rise strictly; `values` are NaN where
    the run had no finite one.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunData:
    """One run directory, read."""

    directory: Path
    config: dict[str, Any]  # by section.field
    series: dict[str, Series]  # by the metric's name
    last_step: int  # the last one with metrics, 0 where there are none yet
    skipped: int  # lines of metrics.jsonl that are no records
    summary: dict[str, Any]  # empty until the run has finished
    starts: list[dict[str, Any]]  # environment.jsonl
    exports: list[tuple[str, dict[str, Any]]]  # (file's name, what `export --json` wrote)
    evaluations: list[tuple[str, dict[str, Any]]]  # the same of `evaluate --json`


def number(value: Any) -> float:
    """`value` as a float; NaN where it is no number, or one beyond `LARGEST`."""
    try:
        found = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond the floats
        return math.nan
    return found if abs(found) <= LARGEST else math.nan


def make_series(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Every quantity of the records in which it is a number or null. Of two values at one step the
    later one counts.
    """
    columns: dict[str, dict[float, float]] = {}
    for record in records:
        step = number(record["step"])
        if not 0 <= step <= MOST_STEPS:
            continue
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                columns.setdefault(name, {})[step] = number(value)
    found = {}
    for name, column in columns.items():
        steps, values = np.array(list(column)), np.array(list(column.values()))
        order = np.argsort(steps, kind="stable")
        found[name] = Series(steps[order], values[order])
    return found


def read_results(
    directory: Path,
) -> tuple[list[tuple[str, dict[str, Any]]], list[tuple[str, dict[str, Any]]]]:
    """The results of `export` and of `evaluate` among the directory's JSON files, known by their
    keys; others are let be.
    """
    exports, evaluations = [], []
    for path in sorted(directory.glob("*.json")):
        try:
            value = typed_json.read(path, UserError) if path.name not in OWN_FILES else None
        except UserError:
            continue
        if not isinstance(value, dict):
            continue
        if {"artifact_bytes", "bits_per_weight"} <= value.keys():
            exports.append((path.name, value))
        elif {"bpb", "mode"} <= value.keys() or {"tasks", "weights"} <= value.keys():
            evaluations.append((path.name, value))
    return exports, evaluations


def read_run(directory: Path, *, may_be_empty: bool = False) -> RunData:
    """The run in `directory`. Raises `UserError` where there is none, or no metrics yet unless it
    `may_be_empty`.
    """
    config = asdict(run_directory.read_config(directory))
    metrics, skipped = directory / "metrics.jsonl", list[int]()
    records = read_metrics(metrics, skipped) if metrics.exists() or not may_be_empty else []
    series = make_series(records)
    if not series and not may_be_empty:
        raise UserError(
            f"{metrics}: holds no metrics yet; try again once a step is logged, or watch the run"
            " with --live"
        )
    summary_path = run_directory.summary_path(directory)
    summary = typed_json.read(summary_path, UserError) if summary_path.exists() else {}
    exports, evaluations = read_results(directory)
    return RunData(
        directory=directory,
        config={
            f"{section}.{name}": value
            for section, fields in config.items()
            for name, value in fields.items()
        },
        series=series,
        last_step=int(max((column.steps[-1] for column in series.values()), default=0)),
        skipped=len(skipped),
        summary=summary if isinstance(summary, dict) else {},
        starts=environment.read(directory),
        exports=exports,
        evaluations=evaluations,
    )
