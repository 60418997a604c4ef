"""The report's tables, as text: scores, configurations, environments, what `export` and `evaluate`
have found.

A table is {"columns": [text], "rows": [row]}; a row {"cells": [[text, class]]} and, where it
stands for curves, "group" and "run", their numbers. A class is "number", "mark" (differs from the
first run's), "best", "soft" or nothing, or several.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sngpt_jax.base.terminal import format_duration
from sngpt_jax.report import grouping
from sngpt_jax.report.reading import RunData, number

Table = dict[str, Any]
Cell = list[str]

ABSENT = "–"


def text(value: Any) -> str:
    """A value for a table's cell: as in a config.json, strings without their quotes."""
    if isinstance(value, str):
        return value or '""'
    try:
        return ABSENT if value is None else json.dumps(value)
    except RecursionError:
        return "…"


def figure(value: Any, form: str) -> Cell:
    """A number by a format such as `,.4f`, or a dash."""
    found = number(value)
    return [format(found, form) if found == found else ABSENT, "number"]


# ---------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """A column: a field of summary.json, or of a run that has not finished what stands for it in
    its metrics so far.
    """

    title: str
    final: str
    form: str
    metric: str = ""
    # of the metric's finite values
    so_far: Callable[[np.ndarray], float] = lambda values: values[-1]


SCORES = (
    Score("val BPB", "val_bpb", ".4f", "val_bpb"),
    Score("val loss", "val_loss", ".4f", "val_loss"),
    Score("best val loss", "best_val_loss", ".4f", "val_loss", np.min),
    Score("SWA BPB", "swa_val_bpb", ".4f", "swa_val_bpb"),
    Score("EMA BPB", "ema_val_bpb", ".4f", "ema_val_bpb"),
    Score("tok/s", "tok_per_s", ",.0f", "tok_per_s", lambda values: float(np.median(values[-32:]))),
)
SECONDS = Score("training", "train_seconds", "", "elapsed_seconds")
TOKENS = Score("tokens", "tokens", ",.0f", "tokens")


def state(run: RunData) -> str:
    """`finished`, or how far the run has come, and whether it has diverged."""
    loss = run.series.get("train_loss")
    if loss is not None and len(loss.values) and loss.values[-1] != loss.values[-1]:
        return f"diverged at step {int(loss.steps[-1]):,}"
    steps = number(run.config.get("train.steps"))
    of = f" of {steps:,.0f}" if steps == steps else ""
    return "finished" if run.summary else f"at step {run.last_step:,}{of}"


def score(run: RunData, of: Score) -> float:
    """A score of the run as it is; NaN where there is none."""
    if run.summary:
        return number(run.summary.get(of.final))
    series = run.series.get(of.metric)
    finite = series.values[np.isfinite(series.values)] if series is not None else np.empty(0)
    return float(of.so_far(finite)) if len(finite) else float("nan")


def runs_table(
    runs: Sequence[RunData], names: Sequence[str], groups: Sequence[Sequence[int]]
) -> Table:
    """A row a run, and before a group of several a row of its means; the best BPB of a finished
    run or of a mean is marked.
    """
    labels = grouping.labels(names, groups)
    shown = [of for of in SCORES if any(np.isfinite(score(run, of)) for run in runs)]
    rows: list[dict[str, Any]] = []
    means: dict[int, float] = {}  # by row, what competes for the best
    place = next((i for i, of in enumerate(shown) if of.final == "val_bpb"), None)
    for g, members in enumerate(groups):
        finished = grouping.one_a_seed([runs[i] for i in members if runs[i].summary])
        if len(members) > 1:
            found = [
                grouping.statistic(run.summary.get(of.final) for run in finished) for of in shown
            ]
            seeds = {text(runs[i].config.get(grouping.SEED)) for i in members}
            again = "" if len(seeds) == len(members) else f", {len(seeds)} seeds"
            cells = [[labels[g], ""], [f"{len(members)} runs{again}", ""]]
            cells.append([f"mean ± sd, n = {len(finished)}", ""])
            for value, of in zip(found, shown, strict=True):
                spread = f" ± {value.sd:{of.form}}" if value and value.sd is not None else ""
                fewer = f" (n = {value.n})" if value and value.n < len(finished) else ""
                cells.append(
                    [f"{value.mean:{of.form}}{spread}{fewer}" if value else ABSENT, "number"]
                )
            cells += [[ABSENT, "number"]] * 3
            if place is not None and (best := found[place]):
                means[len(rows)] = best.mean
            rows.append({"group": g, "cells": cells})
        for i in members:
            run = runs[i]
            if len(members) == 1 and finished and place is not None:
                means[len(rows)] = score(run, shown[place])
            seconds = score(run, SECONDS)
            cells = [[names[i], ""], [text(run.config.get(grouping.SEED)), ""], [state(run), ""]]
            cells += [figure(score(run, of), of.form) for of in shown]
            cells.append([format_duration(seconds) if seconds == seconds else ABSENT, "number"])
            cells += [
                figure(score(run, TOKENS), TOKENS.form),
                figure(run.summary.get("parameters"), ",.0f"),
            ]
            rows.append({"group": g, "run": i, "cells": cells})
    competing = {row: value for row, value in means.items() if value == value}
    if place is not None and len(competing) > 1:
        rows[min(competing, key=competing.__getitem__)]["cells"][3 + place][1] += " best"
    columns = [
        "run",
        "seed",
        "state",
        *(of.title for of in [*shown, SECONDS, TOKENS]),
        "parameters",
    ]
    return {"columns": columns, "rows": rows}


# ---------------------------------------------------------------------------------------------- side by side


def side_by_side(
    columns: Sequence[str], sides: Sequence[Mapping[str, str]], only_differing: bool
) -> Table:
    """A row a name, a column a side; what differs from the first side is marked."""
    names = list(dict.fromkeys(name for side in sides for name in side))
    rows = []
    for name in names:
        cells = [side.get(name, ABSENT) for side in sides]
        if not only_differing or len(set(cells)) > 1:
            rows.append(
                {
                    "cells": [
                        [name, ""],
                        *([cell, "mark" if cell != cells[0] else ""] for cell in cells),
                    ]
                }
            )
    return {"columns": ["", *columns], "rows": rows}


def config_table(
    runs: Sequence[RunData],
    names: Sequence[str],
    groups: Sequence[Sequence[int]],
    only_differing: bool,
) -> Table:
    """The configurations, a column a group; of the seeds of a group's runs a list."""
    sides = []
    for members in groups:
        side = {name: text(value) for name, value in runs[members[0]].config.items()}
        if grouping.SEED in side:
            side[grouping.SEED] = ", ".join(
                dict.fromkeys(text(runs[i].config.get(grouping.SEED)) for i in members)
            )
        sides.append(side)
    return side_by_side(grouping.labels(names, groups), sides, only_differing)


def _of_start(name: str, value: Any) -> str:
    found = text(value)
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", found) if name == "commit" else found


def environment_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """What each run was started with last; where a value has changed since its first start, both."""
    sides = []
    for run in runs:
        side = {"starts": str(len(run.starts))}
        first, last = (run.starts[0], run.starts[-1]) if run.starts else ({}, {})
        for name in dict.fromkeys([*first, *last]):
            was, now = (_of_start(name, start.get(name)) for start in (first, last))
            title = {"step": "started after step", "time": "started at"}.get(name, name)
            side[title] = now if was == now or name in ("step", "time") else f"{was} → {now}"
        sides.append(side)
    table = side_by_side(names, sides, only_differing=False)
    for row in table["rows"]:
        if row["cells"][0][0] == "started at":  # differs always
            row["cells"] = [[cell, ""] for cell, _ in row["cells"]]
    return table


# ---------------------------------------------------------------------------------------------- export and evaluate


EXPORTED = (  # (name in the exporter's JSON, title, format)
    ("tensors", "tensors", ",.0f"),
    ("weights", "weights", ",.0f"),
    ("bytes", "bytes", ",.0f"),
    ("entropy", "entropy, bits", ".3f"),
    ("coded", "coded, bits", ".3f"),
    ("scales", "scales, bits", ".3f"),
    ("packing_loss", "packing, bits", "+.3f"),
    ("error", "rel. MSE", ".2e"),
)


def _at(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def export_tables(name: str, results: Sequence[tuple[str, dict[str, Any]]]) -> list[Table]:
    """For each export of a run its bytes by group of tensors, under a line of its totals."""
    found = []
    for file, value in results:
        total = figure(value.get("total_bytes"), ",.0f")[0]
        line = [f"{name} · {file}", f"{total} bytes"]
        line.append(f"artifact {figure(value.get('artifact_bytes'), ',.0f')[0]}")
        line.append(f"program {figure(value.get('code_bytes'), ',.0f')[0]}")
        if number(value.get("limit")) > 0:
            fits = "fits" if value.get("fits") is True else "does not fit"
            line.append(f"{fits} the limit of {figure(value['limit'], ',.0f')[0]}")
        before, after, gap = (
            _at(value, "score", key) for key in ("bpb_before", "bpb_after", "gap")
        )
        if number(after) == number(after):
            line.append(
                f"BPB {figure(before, '.5f')[0]} before, {figure(after, '.5f')[0]} after, gap"
                f" {figure(gap, '+.5f')[0]}"
            )
        groups = value["bits_per_weight"] if isinstance(value["bits_per_weight"], dict) else {}
        rows = []
        for group, of in groups.items():
            cells = [[text(_at(of, "group") or group), ""], [text(_at(of, "width")), ""]]
            rows.append(
                {"cells": [*cells, *(figure(_at(of, key), form) for key, _, form in EXPORTED)]}
            )
        columns = ["group", "kept as", *(title for _, title, _ in EXPORTED)]
        found.append({"title": " · ".join(line), "columns": columns, "rows": rows})
    return found


def evaluation_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """A row for each score of a validation stream and for each metric of a task."""
    rows = []
    for run, name in zip(runs, names, strict=True):
        for file, value in run.evaluations:
            kept = f"{text(value.get('weights'))}{', quantized' if value.get('fake_quantized') is True else ''}"
            head = [[name, ""], [file, "soft"], figure(value.get("step"), ",.0f"), [kept, ""]]
            if "bpb" in value:
                stride = (
                    f", stride {text(value.get('stride'))}"
                    if value.get("mode") == "sliding"
                    else ""
                )
                what = [f"{text(value['mode'])}{stride}", ""]
                scores = [
                    figure(value.get(key), form)
                    for key, form in (("tokens", ",.0f"), ("loss", ".4f"), ("bpb", ".4f"))
                ]
                rows.append({"cells": [*head, what, *scores, ["", ""]]})
                if cache := _at(value, "ngram", "cache"):
                    mass = figure(_at(value, "ngram", "mass", "mean"), ".6g")[0]
                    note = f"mass {mass}" + (
                        ""
                        if _at(value, "ngram", "is_distribution") is True
                        else ": not a distribution"
                    )
                    scores = [
                        scores[0],
                        *(figure(_at(value, "ngram", key), ".4f") for key in ("loss", "bpb")),
                    ]
                    rows.append(
                        {
                            "cells": [
                                *head,
                                [f"{what[0]}, {text(cache)} cache", ""],
                                *scores,
                                [note, ""],
                            ]
                        }
                    )
            tasks = value.get("tasks")
            for task, metrics in tasks.items() if isinstance(tasks, dict) else ():
                if isinstance(metrics, dict):
                    found = ", ".join(f"{key} {text(of)}" for key, of in metrics.items())
                    rows.append(
                        {"cells": [*head, [task, ""], *([[ABSENT, "number"]] * 3), [found, ""]]}
                    )
    return {
        "columns": ["run", "file", "step", "weights", "what", "tokens", "loss", "BPB", ""],
        "rows": rows,
    }
