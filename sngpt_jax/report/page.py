"""The report as one HTML page: its data, of bounded size for runs of any length, and the page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sngpt_jax.base import webpage
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.report import grouping, tables
from sngpt_jax.report.curves import smooth, thin
from sngpt_jax.report.reading import RunData

POINTS = 600  # most points of a curve as measured
SMOOTH_POINTS = 300  # most points of a running mean or a band
LAYER_POINTS = 60  # most points of a quantity of one layer of a sparse code
SMALLEST = 1e-100  # smaller values are drawn as 0, because a logarithmic axis would have no end


@dataclass(frozen=True)
class Metric:
    """A metric with a chart of its own."""

    name: str
    title: str
    unit: str = ""
    noisy: bool = False  # the running mean is drawn over the values
    spiky: bool = True  # the axis begins with the range of most values


METRICS = (
    Metric("train_loss", "Training loss", "nats/token", noisy=True),
    Metric("val_loss", "Validation loss", "nats/token"),
    Metric("val_bpb", "Validation BPB", "bits/byte"),
    Metric("lr", "Learning rate of the matrices", spiky=False),
    Metric("grad_norm", "Gradient norm", noisy=True),
    Metric("tok_per_s", "Speed", "tokens/s", noisy=True),
)
NOISY = {metric.name for metric in METRICS if metric.noisy}
# one number per run, or shown elsewhere
NOT_DRAWN = re.compile(r"tokens|elapsed_seconds|val_seconds|(swa|ema)_val_\w+|code/.*")
HEALTH = {
    "dead": "Dead features, share of the level",
    "silent": "Silent features, share of the level",
    "zombies": "Zombie features, share of the level",
    "cos": "Cosine of input and reconstruction",
    "cos_centered": "Cosine of input less its mean and reconstruction",
    "rms": "Size of the reconstruction (RMS)",
    "mu_mean": "Size of the scores’ running mean",
    "sigma_mean": "Standard deviation of the scores",
    "min_z": "Smallest standardized score selected",
    "duplicates": "Candidates proposed twice, per token",
}
ALWAYS_SHOWN = (
    "dead",
    "silent",
    "zombies",
    "cos",
    "cos_centered",
    "rms",
)  # a click shows the others
_CODE = re.compile(rf"code/(?:layer(\d+)/)?(?:level(\d+)/)?({'|'.join(HEALTH)})")


class Numbers:
    """Arrays as lists for JSON: six digits per number, null for NaN, equal arrays only once."""

    def __init__(self) -> None:
        self.arrays: list[list[float | int | None]] = []
        self._places: dict[bytes, int] = {}

    def put(self, name: str, limit: int, *arrays: np.ndarray) -> list[int]:
        """The places of a curve's steps, values and other arrays, thinned by the values."""
        kept = thin(arrays[1], LAYER_POINTS if name.startswith("code/layer") else limit)
        places = []
        for array in arrays:
            key = array[kept].tobytes()
            if key not in self._places:
                self._places[key] = len(self.arrays)
                self.arrays.append([_short(x) for x in array[kept].tolist()])
            places.append(self._places[key])
        return places


def _short(x: float) -> float | int | None:
    if not np.isfinite(x):
        return None
    if abs(x) < SMALLEST:
        return 0
    return int(x) if x == int(x) and abs(x) < 2**53 else float(f"{x:.6g}")


def _drawn(name: str) -> bool:
    return bool(_CODE.fullmatch(name) or not NOT_DRAWN.fullmatch(name))


def run_curves(run: RunData, numbers: Numbers) -> dict[str, dict[str, list[int]]]:
    """By metric the places of the curve as measured, and of the running mean of a noisy one."""
    found = {}
    for name, series in run.series.items():
        if _drawn(name) or name == "elapsed_seconds":  # which is an axis
            curves = {"raw": numbers.put(name, POINTS, *series)}
            if name in NOISY and (mean := smooth(series)):
                curves["mean"] = numbers.put(name, SMOOTH_POINTS, *mean)
            found[name] = curves
    return found


def group_bands(runs: Sequence[RunData], numbers: Numbers) -> dict[str, list[int]]:
    """By metric the places of a group's steps, means and standard deviations."""
    found = {}
    runs = grouping.one_per_seed(runs)
    for name in filter(_drawn, runs[0].series):
        curves = [run.series[name] for run in runs if name in run.series]
        if len(curves) < len(runs):
            continue
        means = [mean for curve in curves if name in NOISY and (mean := smooth(curve))]
        band = grouping.band(means if len(means) == len(curves) else curves)
        if band and len(band.steps) > 1:
            found[name] = numbers.put(name, SMOOTH_POINTS, *band)
    return found


def health(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """The layers of sparse codes, and their quantities with the levels; None if there are none."""
    names = (name for run in runs for name in run.series)
    matches = [match for match in map(_CODE.fullmatch, names) if match]
    quantities = []
    for name, title in HEALTH.items():
        if found := [match for match in matches if match[3] == name]:
            levels = sorted({int(match[2]) for match in found if match[2]})
            more = name not in ALWAYS_SHOWN
            quantities.append({"name": name, "title": title, "levels": levels, "more": more})
    layers = sorted({match[1] for match in matches if match[1]})
    return {"quantities": quantities, "layers": layers} if quantities else None


def notes(run: RunData) -> list[str]:
    """Lines about parts of a run that could not be read or drawn."""
    found = []
    if run.skipped:
        lines = "1 line" if run.skipped == 1 else f"{run.skipped:,} lines"
        found.append(f"{run.name}: {lines} of metrics.jsonl could not be read and were left out")
    losses = [run.series[loss].values for loss in ("train_loss", "val_loss") if loss in run.series]
    if count := sum(int(np.isnan(values).sum()) for values in losses):
        found.append(f"{run.name}: {count:,} losses are not finite")
    return found


def report(runs: Sequence[RunData], written: str, live: str = "") -> dict[str, Any]:
    """The data of the page: plain values without NaN.

    `written` is the time for a reader. `live` names these data for a served page that asks for
    newer ones.
    """
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.directory)) for run in runs]
    groups, numbers = grouping.group(runs), Numbers()
    logged = {name for run in runs for name in run.series}
    others = {name for name in logged if not NOT_DRAWN.fullmatch(name)}
    others -= {metric.name for metric in METRICS}
    metrics = [*METRICS, *(Metric(name, name) for name in sorted(others))]
    shown_runs = []
    for run in runs:
        batch_tokens, curves = run.config["data.batch_tokens"], run_curves(run, numbers)
        shown_runs.append({"name": run.name, "batch_tokens": batch_tokens, "curves": curves})
    shown_groups = []
    for group in groups:
        bands = group_bands([runs[i] for i in group.runs], numbers)
        shown_groups.append(group._asdict() | {"bands": bands})
    started = any(run.starts for run in runs)
    return {
        "title": f"Report of {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        "written": written,
        "live": live,
        "notes": [
            *tables.not_compared(runs, groups),
            *(note for run in runs for note in notes(run)),
        ],
        "runs": shown_runs,
        "groups": shown_groups,
        "metrics": [
            vars(metric) | {"more": metric.name in others}
            for metric in metrics
            if metric.name in logged
        ],
        "health": health(runs),
        "scores": tables.runs_table(runs, groups),
        "differences": tables.config_table(runs, groups, only_differing=True),
        "configuration": tables.config_table(runs, groups, only_differing=False),
        "exports": [table for run in runs for table in tables.export_tables(run)],
        "evaluations": tables.evaluation_table(runs),
        "environment": tables.environment_table(runs) if started else None,
        "numbers": numbers.arrays,
    }


def page(data: dict[str, Any]) -> str:
    """The HTML page of `report`'s data."""
    title, scripts, connect = data["title"], ("chart.js", "report.js"), bool(data["live"])
    return webpage.render(__package__, "report", title, data, scripts=scripts, connect=connect)


def write(out: Path, data: dict[str, Any]) -> None:
    """Writes the page of `report`'s data to the file of `--out`. Raises `UserError`."""
    write_text_atomic(out, page(data))
    count = len(data["runs"])
    print(f"{count} run{'s' * (count != 1)}: {out}")
