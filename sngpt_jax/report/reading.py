"""What a run directory holds, as far as a report needs it; values of a wrong type are left out."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import flat
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run import environment
from sngpt_jax.run.metrics import read_metrics

LARGEST = 1e38  # about the largest float32; charts of much larger numbers have no axes
MOST_STEPS = 2**53  # the limit of train.steps
OWN_FILES = ("config.json", "summary.json", "tokenizer.json")

Result = tuple[str, dict[str, Any]]  # a file's name, and the JSON object in it


class Series(NamedTuple):
    """A quantity, float64 [N], NaN if the run had no finite value, by strictly rising `steps`."""

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> "Series":
        """The part whose values are finite."""
        known = np.isfinite(self.values)
        return Series(self.steps[known], self.values[known])


@dataclass(frozen=True)
class RunData:
    """One run directory, read."""

    directory: Path
    name: str  # the directory's
    config: dict[str, Any]  # by section.field
    series: dict[str, Series]  # by the metric's name
    last_step: int  # the last step with metrics, 0 if there are none yet
    skipped: int  # lines of metrics.jsonl that are no records
    summary: dict[str, Any]  # empty until the run has finished
    starts: list[dict[str, Any]]  # environment.jsonl
    exports: list[Result]  # of `export --json`
    evaluations: list[Result]  # of `evaluate --json`


def number(value: Any) -> float:
    """`value` as a float; NaN if it is no number or larger than `LARGEST`."""
    try:
        found = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond the floats
        return math.nan
    return found if abs(found) <= LARGEST else math.nan


def make_series(records: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """The records' quantities that are numbers or null. A step's later value counts."""
    columns: dict[str, dict[float, float]] = {}
    for record in records:
        step = number(record["step"])
        if not 0 <= step <= MOST_STEPS:
            continue
        for name, value in record.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                columns.setdefault(name, {})[step] = number(value)
    return {name: Series(*np.array(sorted(column.items())).T) for name, column in columns.items()}


def read_results(directory: Path) -> tuple[list[Result], list[Result]]:
    """The results of `export` and of `evaluate` among the JSON files, which their keys identify."""
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
    """The run in `directory`. Raises `UserError` if it is none.

    A run without metrics is refused unless it `may_be_empty`.
    """
    config = run_directory.read_config(directory)
    metrics, skipped = directory / "metrics.jsonl", list[int]()
    records = read_metrics(metrics, skipped) if metrics.exists() or not may_be_empty else []
    series = make_series(records)
    if not series and not may_be_empty:
        raise UserError(
            f"{metrics}: holds no metrics yet; try again once a step is logged, or use --live"
        )
    summary_path = run_directory.summary_path(directory)
    summary = typed_json.read(summary_path, UserError) if summary_path.exists() else {}
    exports, evaluations = read_results(directory)
    return RunData(
        directory=directory,
        name=directory.absolute().name,
        config=flat(config),
        series=series,
        last_step=int(max((column.steps[-1] for column in series.values()), default=0)),
        skipped=len(skipped),
        summary=summary if isinstance(summary, dict) else {},
        starts=environment.read(directory),
        exports=exports,
        evaluations=evaluations,
    )
