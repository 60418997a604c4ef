"""The report as one HTML page: its data, bounded whatever the runs' length, and the page around
them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sngpt_jax.base import webpage
from sngpt_jax.report import grouping, tables
from sngpt_jax.report.curves import smooth, thin
from sngpt_jax.report.reading import RunData, Series, number

POINTS = 600  # most of a curve as measured
SMOOTH_POINTS = 300  # of a running mean, and of a band
SMALLEST = 1e-100  # what is less is drawn as 0: a logarithmic axis would have no end
LAYER_POINTS = 60  # of a quantity of one layer of a sparse code


@dataclass(frozen=True)
class Metric:
    """A chart of its own."""

    name: str
    title: str
    unit: str
    noisy: bool = False  # the running mean is drawn over the values
    spiky: bool = False  # the axis begins with what most values need


METRICS = (
    Metric("train_loss", "Training loss", "nats/token", noisy=True, spiky=True),
    Metric("val_loss", "Validation loss", "nats/token", spiky=True),
    Metric("val_bpb", "Validation BPB", "bits/byte", spiky=True),
    Metric("lr", "Learning rate of the matrices", ""),
    Metric("grad_norm", "Gradient norm", "", noisy=True, spiky=True),
    Metric("tok_per_s", "Speed", "tokens/s", noisy=True, spiky=True),
)
# a number a run, or known otherwise
NOT_DRAWN = re.compile(r"tokens|elapsed_seconds|val_seconds|(swa|ema)_val_\w+|code/.*")
HEALTH = {
    "dead": "Dead features, share of the level",
    "silent": "Silent features, share of the level",
    "zombies": "Zombie features, share of the level",
    "cos": "Cosine of input and reconstruction",
    "rms": "Size of the reconstruction (RMS)",
    "mu_mean": "Size of the scores’ running mean",
    "sigma_mean": "Standard deviation of the scores",
    "min_z": "Smallest standardized score selected",
    "duplicates": "Candidates brought twice, a token",
}
ALWAYS_SHOWN = ("dead", "silent", "zombies", "cos", "rms")  # the others are behind a click
_CODE = re.compile(r"code/(?:layer(\d+)/)?(?:level(\d+)/)?(\w+)")


def run_names(runs: Sequence[RunData]) -> list[str]:
    """The directories' last parts where these tell the runs apart, else their paths."""
    short = [run.directory.absolute().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.directory) for run in runs]


class Numbers:
    """Arrays as lists for JSON, six digits of each number, null for NaN; equal arrays once."""

    def __init__(self) -> None:
        self.arrays: list[list[float | int | None]] = []
        self._places: dict[bytes, int] = {}

    def put(self, array: np.ndarray) -> int:
        """The place of `array` among `arrays`."""
        key = np.ascontiguousarray(array, np.float64).tobytes()
        if key not in self._places:
            self._places[key] = len(self.arrays)
            self.arrays.append([_short(x) for x in array.tolist()])
        return self._places[key]


def _short(x: float) -> float | int | None:
    if not np.isfinite(x):
        return None
    if abs(x) < SMALLEST:
        return 0
    return int(x) if x == int(x) and abs(x) < 2**53 else float(f"{x:.6g}")


def _curve(numbers: Numbers, series: Series, limit: int) -> list[int]:
    kept = thin(series.values, limit)
    return [numbers.put(series.steps[kept]), numbers.put(series.values[kept])]


def run_curves(run: RunData, numbers: Numbers) -> dict[str, dict[str, list[int]]]:
    """By metric the curve as measured and, of noisy ones, its running mean: places of steps and
    values among the numbers.
    """
    noisy = {metric.name for metric in METRICS if metric.noisy}
    found = {}
    for name, series in run.series.items():
        if name != "elapsed_seconds" and NOT_DRAWN.fullmatch(name) and not _is_health(name):
            continue
        found[name] = {
            "raw": _curve(
                numbers, series, LAYER_POINTS if name.startswith("code/layer") else POINTS
            )
        }
        if name in noisy and (mean := smooth(series)):
            found[name]["mean"] = _curve(numbers, mean, SMOOTH_POINTS)
    return found


def _is_health(name: str) -> bool:
    match = _CODE.fullmatch(name)
    return bool(match and match[3] in HEALTH)


def group_bands(runs: Sequence[RunData], numbers: Numbers) -> dict[str, list[int]]:
    """By metric the band of runs of one group: places of steps, means and standard deviations."""
    noisy = {metric.name for metric in METRICS if metric.noisy}
    found = {}
    runs = grouping.one_a_seed(runs)
    for name in runs[0].series:
        if not all(name in run.series for run in runs) or (
            NOT_DRAWN.fullmatch(name) and not _is_health(name)
        ):
            continue
        curves = [run.series[name] for run in runs]
        means = [mean for curve in curves if name in noisy and (mean := smooth(curve))]
        band = grouping.band(means if len(means) == len(curves) else curves)
        if band and len(band.steps) > 1:
            kept = thin(band.mean, LAYER_POINTS if name.startswith("code/layer") else SMOOTH_POINTS)
            found[name] = [numbers.put(array[kept]) for array in (band.steps, band.mean, band.sd)]
    return found


def health(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """What there is of the health of sparse codes: layers, and quantities with their levels; None
    where there is nothing.
    """
    matches = [
        match
        for run in runs
        for name in run.series
        if (match := _CODE.fullmatch(name)) and match[3] in HEALTH
    ]
    quantities = []
    for name, title in HEALTH.items():
        of = [match for match in matches if match[3] == name]
        if of:
            levels = sorted({int(match[2]) for match in of if match[2]})
            quantities.append(
                {"name": name, "title": title, "levels": levels, "more": name not in ALWAYS_SHOWN}
            )
    layers = sorted({match[1] for match in matches if match[1]})
    return {"quantities": quantities, "layers": layers} if quantities else None


def notes(run: RunData, name: str) -> list[str]:
    """What a reader should know of how the run was read."""
    found = []
    if run.skipped:
        lines = "1 line" if run.skipped == 1 else f"{run.skipped:,} lines"
        found.append(f"{name}: {lines} of metrics.jsonl could not be read and were left out")
    holes = [metric for metric in ("train_loss", "val_loss") if metric in run.series]
    count = sum(int(np.isnan(run.series[metric].values).sum()) for metric in holes)
    if count:
        found.append(f"{name}: {count:,} losses are not finite")
    return found


def report(runs: Sequence[RunData], written: str, live: str = "") -> dict[str, Any]:
    """The data of the page: plain values, none of them NaN.

    `written`: when, for a reader. `live`: of a page that is served and asks for newer data, the
    name of these.
    """
    names, groups, numbers = run_names(runs), grouping.group(runs), Numbers()
    known = {metric.name for metric in METRICS}
    others = sorted(
        {
            name
            for run in runs
            for name in run.series
            if name not in known and not NOT_DRAWN.fullmatch(name)
        }
    )
    metrics = [*METRICS, *(Metric(name, name, "", spiky=True) for name in others)]
    batch_tokens = [number(run.config.get("data.batch_tokens")) for run in runs]
    environments = (
        tables.environment_table(runs, names) if any(run.starts for run in runs) else None
    )
    return {
        "title": f"Report of {names[0]}" if len(runs) == 1 else f"Report of {len(runs)} runs",
        "written": written,
        "live": live,
        "notes": [note for run, name in zip(runs, names, strict=True) for note in notes(run, name)],
        "runs": [
            {
                "name": name,
                "batch_tokens": tokens if tokens == tokens else None,
                "curves": run_curves(run, numbers),
            }
            for run, name, tokens in zip(runs, names, batch_tokens, strict=True)
        ],
        "groups": [
            {
                "name": label,
                "runs": members,
                "bands": (
                    group_bands([runs[i] for i in members], numbers) if len(members) > 1 else {}
                ),
            }
            for members, label in zip(groups, grouping.labels(names, groups), strict=True)
        ],
        "metrics": [
            vars(metric) | {"more": metric.name in others}
            for metric in metrics
            if any(metric.name in run.series for run in runs)
        ],
        "health": health(runs),
        "scores": tables.runs_table(runs, names, groups),
        "differences": tables.config_table(runs, names, groups, only_differing=True),
        "configuration": tables.config_table(runs, names, groups, only_differing=False),
        "exports": [
            table
            for run, name in zip(runs, names, strict=True)
            for table in tables.export_tables(name, run.exports)
        ],
        "evaluations": tables.evaluation_table(runs, names),
        "environment": environments,
        "numbers": numbers.arrays,
    }


def page(data: dict[str, Any]) -> str:
    """The HTML page of `report`'s data."""
    scripts = ("chart.js", "report.js")
    connect = bool(data["live"])
    return webpage.render(
        __package__, "report", data["title"], data, scripts=scripts, connect=connect
    )


def write(out: Path, data: dict[str, Any]) -> None:
    """Writes the page of `report`'s data to the file of `--out`. Raises `UserError`."""
    webpage.write(out, page(data))
    count = len(data["runs"])
    print(f"{count} run{'s' * (count != 1)}: {out}")
