"""The report's tables as text: scores, configurations, environments, exports and evaluations.

A table is {"columns": [text], "rows": [row]}. A row is {"cells": [[text, class]]}; a row that
stands for curves also has the numbers "group" and "run". A class is "number", "mark" (differs from
the first run's), "best", "soft", nothing, or several.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sngpt_jax.base.terminal import format_duration
from sngpt_jax.report import grouping
from sngpt_jax.report.reading import Result, RunData, number

Table = dict[str, Any]
Cell = list[str]

ABSENT = "–"
NO_NUMBER = [ABSENT, "number"]


def text(value: Any) -> str:
    """A value for a table's cell: as in a config.json, but strings without quotes."""
    if isinstance(value, str):
        return value or '""'
    try:
        return ABSENT if value is None else json.dumps(value)
    except RecursionError:
        return "…"


def figure(value: Any, form: str) -> Cell:
    """A number in a format such as `,.4f`, or a dash."""
    found = number(value)
    return [format(found, form), "number"] if found == found else NO_NUMBER


def _words(*texts: str) -> list[Cell]:
    return [[found, ""] for found in texts]


# ---------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """A column: a field of summary.json, or for an unfinished run a value of its metrics so far."""

    title: str
    final: str  # the field
    form: str
    metric: str
    # from the metric's finite values
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
    """`finished`, the last step so far, or the step at which the run diverged."""
    loss = run.series.get("train_loss")
    if loss is not None and len(loss.values) and loss.values[-1] != loss.values[-1]:
        return f"diverged at step {int(loss.steps[-1]):,}"
    steps = number(run.config.get("train.steps"))
    of = f" of {steps:,.0f}" if steps == steps else ""
    return "finished" if run.summary else f"at step {run.last_step:,}{of}"


def score(run: RunData, column: Score) -> float:
    """A run's final score, or its value so far; NaN if it has none."""
    if run.summary:
        return number(run.summary.get(column.final))
    series = run.series.get(column.metric)
    finite = series.values[np.isfinite(series.values)] if series is not None else np.empty(0)
    return float(column.so_far(finite)) if len(finite) else float("nan")


def _mean(values: Sequence[float], form: str) -> Cell:
    found = grouping.statistic(values)
    if not found:
        return NO_NUMBER
    spread = f" ± {found.sd:{form}}" if found.sd is not None else ""
    fewer = f" (n = {found.n})" if found.n < len(values) else ""
    return [f"{found.mean:{form}}{spread}{fewer}", "number"]


def runs_table(
    runs: Sequence[RunData], names: Sequence[str], groups: Sequence[Sequence[int]]
) -> Table:
    """One row per run, and a row of means before each group of several runs. The best BPB of a
    finished run or of a mean is marked.
    """
    shown = [column for column in SCORES if any(np.isfinite(score(run, column)) for run in runs)]
    columns = ["run", "seed", "state", *(column.title for column in [*shown, SECONDS, TOKENS])]
    rows: list[dict[str, Any]] = []
    competing: list[tuple[float, Cell]] = []  # what may be the best, and its cell

    def compete(value: float, row: list[Cell]) -> None:
        if "val BPB" in columns and value == value:
            competing.append((value, row[columns.index("val BPB")]))

    for g, (members, label) in enumerate(zip(groups, grouping.labels(names, groups), strict=True)):
        finished = grouping.one_per_seed([runs[i] for i in members if runs[i].summary])
        if len(members) > 1:
            seeds = {text(runs[i].config.get(grouping.SEED)) for i in members}
            again = "" if len(seeds) == len(members) else f", {len(seeds)} seeds"
            row = _words(label, f"{len(members)} runs{again}", f"mean ± sd, n = {len(finished)}")
            for column in shown:
                row.append(_mean([score(run, column) for run in finished], column.form))
            best = grouping.statistic(score(run, SCORES[0]) for run in finished)
            compete(best.mean if best else float("nan"), row)
            rows.append({"group": g, "cells": [*row, *[NO_NUMBER] * 3]})
        for i in members:
            run = runs[i]
            row = _words(names[i], text(run.config.get(grouping.SEED)), state(run))
            row += [figure(score(run, column), column.form) for column in shown]
            if len(members) == 1 and finished:
                compete(score(run, SCORES[0]), row)
            seconds = score(run, SECONDS)
            row.append([format_duration(seconds) if seconds == seconds else ABSENT, "number"])
            row.append(figure(score(run, TOKENS), TOKENS.form))
            row.append(figure(run.summary.get("parameters"), ",.0f"))
            rows.append({"group": g, "run": i, "cells": row})
    if len(competing) > 1:
        min(competing, key=lambda found: found[0])[1][1] += " best"
    return {"columns": [*columns, "parameters"], "rows": rows}


# ---------------------------------------- side by side


def side_by_side(
    columns: Sequence[str], sides: Sequence[Mapping[str, str]], only_differing: bool
) -> Table:
    """One row per name and one column per side. Values that differ from the first are marked."""
    rows = []
    for name in dict.fromkeys(name for side in sides for name in side):
        values = [side.get(name, ABSENT) for side in sides]
        if not only_differing or len(set(values)) > 1:
            marked = [[value, "mark" if value != values[0] else ""] for value in values]
            rows.append({"cells": [[name, ""], *marked]})
    return {"columns": ["", *columns], "rows": rows}


def config_table(
    runs: Sequence[RunData],
    names: Sequence[str],
    groups: Sequence[Sequence[int]],
    only_differing: bool,
) -> Table:
    """The configurations, one column per group; a group's seeds are a list."""
    sides = []
    for members in groups:
        side = {name: text(value) for name, value in runs[members[0]].config.items()}
        if grouping.SEED in side:
            seeds = dict.fromkeys(text(runs[i].config.get(grouping.SEED)) for i in members)
            side[grouping.SEED] = ", ".join(seeds)
        sides.append(side)
    return side_by_side(grouping.labels(names, groups), sides, only_differing)


def _of_start(start: Mapping[str, Any], name: str) -> str:
    found = text(start.get(name))
    return re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", found) if name == "commit" else found


def environment_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """The environment of each run's last start; a value that changed since the first start is
    shown with both.
    """
    sides = []
    for run in runs:
        side = {"starts": str(len(run.starts))}
        first, last = (run.starts[0], run.starts[-1]) if run.starts else ({}, {})
        for name in dict.fromkeys([*first, *last]):
            was, now = _of_start(first, name), _of_start(last, name)
            title = {"step": "started after step", "time": "started at"}.get(name, name)
            side[title] = now if was == now or name in ("step", "time") else f"{was} → {now}"
        sides.append(side)
    table = side_by_side(names, sides, only_differing=False)
    for row in table["rows"]:
        if row["cells"][0][0] == "started at":  # differs always
            row["cells"] = _words(*(value for value, _ in row["cells"]))
    return table


# ---------------------------------------- export and evaluate


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


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def export_tables(name: str, results: Sequence[Result]) -> list[Table]:
    """For each export of a run its bytes by group of tensors, under a line of totals."""
    found = []
    columns = ["group", "kept as", *(title for _, title, _ in EXPORTED)]
    for file, value in results:
        total, artifact, program, limit = (
            figure(value.get(key), ",.0f")[0]
            for key in ("total_bytes", "artifact_bytes", "code_bytes", "limit")
        )
        line = [f"{name} · {file}", f"{total} bytes", f"artifact {artifact}", f"program {program}"]
        if number(value.get("limit")) > 0:
            fits = "fits" if value.get("fits") is True else "does not fit"
            line.append(f"{fits} the limit of {limit}")
        before, after, gap = (
            figure(_at(value, "score", key), form)[0]
            for key, form in (("bpb_before", ".5f"), ("bpb_after", ".5f"), ("gap", "+.5f"))
        )
        if after != ABSENT:
            line.append(f"BPB {before} before, {after} after, gap {gap}")
        rows = []
        for group, of in _items(value["bits_per_weight"]):
            words = _words(text(_at(of, "group") or group), text(_at(of, "width")))
            figures = (figure(_at(of, key), form) for key, _, form in EXPORTED)
            rows.append({"cells": [*words, *figures]})
        found.append({"title": " · ".join(line), "columns": columns, "rows": rows})
    return found


def evaluation_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """One row per score of a validation stream and per task."""
    rows: list[dict[str, list[Cell]]] = []
    for run, name in zip(runs, names, strict=True):
        for file, value in run.evaluations:
            kept = text(value.get("weights"))
            if value.get("fake_quantized") is True:
                kept += ", quantized"
            head = [[name, ""], [file, "soft"], figure(value.get("step"), ",.0f"), [kept, ""]]

            def add(what: str, scores: Any, note: str, head: list[Cell] = head) -> None:
                figures = [figure(_at(scores, key), ".4f") for key in ("loss", "bpb")]
                tokens = figure(_at(scores, "tokens"), ",.0f")
                rows.append({"cells": [*head, [what, ""], tokens, *figures, [note, ""]]})

            if "bpb" in value:
                what = text(value["mode"])
                if what == "sliding":
                    what += f", stride {text(value.get('stride'))}"
                add(what, value, "")
                if cache := _at(value, "ngram", "cache"):
                    note = f"mass {figure(_at(value, 'ngram', 'mass', 'mean'), '.6g')[0]}"
                    if _at(value, "ngram", "is_distribution") is not True:
                        note += ": not a distribution"
                    scores = value["ngram"] | {"tokens": value.get("tokens")}
                    add(f"{what}, {text(cache)} cache", scores, note)
            for task, metrics in _items(value.get("tasks")):
                if isinstance(metrics, dict):
                    found = ", ".join(f"{key} {text(of)}" for key, of in metrics.items())
                    add(task, {}, found)
    columns = ["run", "file", "step", "weights", "what", "tokens", "loss", "BPB", ""]
    return {"columns": columns, "rows": rows}
