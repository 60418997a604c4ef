"""The report as one HTML page: its data, whose size has a bound for runs of any length, and the
page around them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sngpt_jax.base import webpage
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.report import grouping, tables
from sngpt_jax.report.curves import smooth, thin
from sngpt_jax.report.reading import RunData, number

POINTS = 600  # most points of a curve as measured
SMOOTH_POINTS = 300  # most points of a running mean or a band
LAYER_POINTS = 60  # most points of a quantity of one layer of a sparse code
SMALLEST = 1e-100  # smaller values are drawn as 0, because a logarithmic axis would have no end


@dataclass(frozen=True)
class Metric:
    """A metric with a chart of its own."""

    name: str
    title: str
    unit: str
    noisy: bool = False  # the running mean is drawn over the values
    spiky: bool = False  # the axis begins with the range of most values


METRICS = (
    Metric("train_loss", "Training loss", "nats/token", noisy=True, spiky=True),
    Metric("val_loss", "Validation loss", "nats/token", spiky=True),
    Metric("val_bpb", "Validation BPB", "bits/byte", spiky=True),
    Metric("lr", "Learning rate of the matrices", ""),
    Metric("grad_norm", "Gradient norm", "", noisy=True, spiky=True),
    Metric("tok_per_s", "Speed", "tokens/s", noisy=True, spiky=True),
)
NOISY = {metric.name for metric in METRICS if metric.noisy}
# one number per run, or shown elsewhere
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
    "duplicates": "Candidates proposed twice, per token",
}
ALWAYS_SHOWN = ("dead", "silent", "zombies", "cos", "rms")  # a click shows the others
_CODE = re.compile(rf"code/(?:layer(\d+)/)?(?:level(\d+)/)?({'|'.join(HEALTH)})")


def run_names(runs: Sequence[RunData]) -> list[str]:
    """The directories' last parts if these are different, else their paths."""
    short = [run.directory.absolute().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.directory) for run in runs]


class Numbers:
    """Arrays as lists for JSON: six digits per number, null for NaN, equal arrays only once."""

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


def _drawn(name: str) -> bool:
    return bool(_CODE.fullmatch(name) or not NOT_DRAWN.fullmatch(name))


def _thinned(numbers: Numbers, name: str, limit: int, *arrays: np.ndarray) -> list[int]:
    """Puts a curve's steps, values and other arrays among the numbers, thinned by the values."""
    kept = thin(arrays[1], LAYER_POINTS if name.startswith("code/layer") else limit)
    return [numbers.put(array[kept]) for array in arrays]


def run_curves(run: RunData, numbers: Numbers) -> dict[str, dict[str, list[int]]]:
    """By metric the curve as measured, and the running mean of a noisy one, as places of steps and
    values among the numbers.
    """
    found = {}
    for name, series in run.series.items():
        if _drawn(name) or name == "elapsed_seconds":  # which is an axis
            curves = {"raw": _thinned(numbers, name, POINTS, series.steps, series.values)}
            if name in NOISY and (mean := smooth(series)):
                curves["mean"] = _thinned(numbers, name, SMOOTH_POINTS, mean.steps, mean.values)
            found[name] = curves
    return found


def group_bands(runs: Sequence[RunData], numbers: Numbers) -> dict[str, list[int]]:
    """By metric the band of a group's runs, as places of steps, means and standard deviations."""
    found = {}
    runs = grouping.one_per_seed(runs)
    for name in filter(_drawn, runs[0].series):
        curves = [run.series[name] for run in runs if name in run.series]
        if len(curves) < len(runs):
            continue
        means = [mean for curve in curves if name in NOISY and (mean := smooth(curve))]
        band = grouping.band(means if len(means) == len(curves) else curves)
        if band and len(band.steps) > 1:
            found[name] = _thinned(numbers, name, SMOOTH_POINTS, band.steps, band.mean, band.sd)
    return found


def health(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """The layers of sparse codes, and their quantities with the levels; None if there are none."""
    names = (name for run in runs for name in run.series)
    matches = [match for match in map(_CODE.fullmatch, names) if match]
    quantities = []
    for name, title in HEALTH.items():
        found = [match for match in matches if match[3] == name]
        levels = sorted({int(match[2]) for match in found if match[2]})
        entry = {"name": name, "title": title, "levels": levels, "more": name not in ALWAYS_SHOWN}
        quantities += [entry] if found else []
    layers = sorted({match[1] for match in matches if match[1]})
    return {"quantities": quantities, "layers": layers} if quantities else None


def notes(run: RunData, name: str) -> list[str]:
    """Lines about parts of a run that could not be read or drawn."""
    found = []
    if run.skipped:
        lines = "1 line" if run.skipped == 1 else f"{run.skipped:,} lines"
        found.append(f"{name}: {lines} of metrics.jsonl could not be read and were left out")
    losses = [run.series[loss].values for loss in ("train_loss", "val_loss") if loss in run.series]
    if count := sum(int(np.isnan(values).sum()) for values in losses):
        found.append(f"{name}: {count:,} losses are not finite")
    return found


def report(runs: Sequence[RunData], written: str, live: str = "") -> dict[str, Any]:
    """The data of the page: plain values without NaN.

    `written` is the time for a reader. `live` names these data for a served page that asks for
    newer ones.
    """
    names, groups, numbers = run_names(runs), grouping.group(runs), Numbers()
    named = list(zip(runs, names, strict=True))
    logged = {name for run in runs for name in run.series}
    others = logged - {metric.name for metric in METRICS}
    others = {name for name in others if not NOT_DRAWN.fullmatch(name)}
    metrics = [*METRICS, *(Metric(name, name, "", spiky=True) for name in sorted(others))]
    shown_runs = []
    for run, name in named:
        tokens = number(run.config.get("data.batch_tokens"))
        batch_tokens = tokens if tokens == tokens else None
        curves = run_curves(run, numbers)
        shown_runs.append({"name": name, "batch_tokens": batch_tokens, "curves": curves})
    shown_groups = []
    for members, label in zip(groups, grouping.labels(names, groups), strict=True):
        several = len(members) > 1
        bands = group_bands([runs[i] for i in members], numbers) if several else {}
        shown_groups.append({"name": label, "runs": members, "bands": bands})
    started = any(run.starts for run in runs)
    return {
        "title": f"Report of {names[0]}" if len(runs) == 1 else f"Report of {len(runs)} runs",
        "written": written,
        "live": live,
        "notes": [note for run, name in named for note in notes(run, name)],
        "runs": shown_runs,
        "groups": shown_groups,
        "metrics": [
            vars(metric) | {"more": metric.name in others}
            for metric in metrics
            if metric.name in logged
        ],
        "health": health(runs),
        "scores": tables.runs_table(runs, names, groups),
        "differences": tables.config_table(runs, names, groups, only_differing=True),
        "configuration": tables.config_table(runs, names, groups, only_differing=False),
        "exports": [t for run, name in named for t in tables.export_tables(name, run.exports)],
        "evaluations": tables.evaluation_table(runs, names),
        "environment": tables.environment_table(runs, names) if started else None,
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
    write_text_atomic(out, page(data))
    count = len(data["runs"])
    print(f"{count} run{'s' * (count != 1)}: {out}")
