"""The report's tables as text: scores, configurations, environments, exports and evaluations.

A table is {"columns": [text], "rows": [row]}. A row is {"cells": [[text, class]]}; a row that
stands for curves also has the numbers "group" and "run". A class is "number", "mark" (differs from
the first run's), "best", "soft", nothing, or several.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np

from sngpt_jax.base.terminal import format_duration
from sngpt_jax.report.grouping import SEED, Group, one_per_seed
from sngpt_jax.report.reading import RunData, number

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
    """A number in a format such as `,.4f`, or `duration`; a dash for anything else."""
    found = number(value)
    if found != found:
        return NO_NUMBER
    return [format_duration(found) if form == "duration" else format(found, form), "number"]


def _words(*texts: str) -> list[Cell]:
    return [[found, ""] for found in texts]


@dataclass(frozen=True)
class Score:
    """A column: a field of summary.json, or for an unfinished run a value of its metrics so far."""

    title: str
    field: str
    form: str = ".4f"
    metric: str = ""  # default: the field's name
    # from the metric's finite values
    so_far: Callable[[np.ndarray], Any] = lambda values: values[-1]


BPB = Score("val BPB", "val_bpb")
SCORES = (
    BPB,
    Score("val loss", "val_loss"),
    Score("best val loss", "best_val_loss", metric="val_loss", so_far=np.min),
    Score("SWA BPB", "swa_val_bpb"),
    Score("EMA BPB", "ema_val_bpb"),
    Score("tok/s", "tok_per_s", ",.0f", so_far=lambda values: np.median(values[-32:])),
)
ALWAYS_SHOWN = (
    Score("training", "train_seconds", "duration", "elapsed_seconds"),
    Score("tokens", "tokens", ",.0f"),
    Score("parameters", "parameters", ",.0f"),
)


def state(run: RunData) -> str:
    """`finished`, the last step so far, or the step at which the run diverged."""
    loss = run.series.get("train_loss")
    if loss and np.isnan(loss.values[-1]):
        return f"diverged at step {int(loss.steps[-1]):,}"
    steps = run.config["train.steps"]
    return "finished" if run.summary else f"at step {run.last_step:,} of {steps:,}"


def score(run: RunData, column: Score) -> float:
    """A run's final score, or its value so far; NaN if it has none."""
    if run.summary:
        return number(run.summary.get(column.field))
    series = run.series.get(column.metric or column.field)
    known = series.finite().values if series else np.empty(0)
    return float(column.so_far(known)) if len(known) else nan


@dataclass(frozen=True)
class Basis:
    """What a run's BPB is of. Only scores on an equal basis compare."""

    tokens: int
    data: str
    hash: str
    byte_count: str

    @classmethod
    def of(cls, run: RunData) -> "Basis | None":
        """The basis of a finished run; None if its version did not state it."""
        found = [run.summary.get(f"val_{name}") for name in ("tokens", "data", "hash")]
        match found:
            case [int(tokens), str(data), str(key)]:
                return cls(
                    tokens, data, key, text(run.summary.get("val_byte_count", "golf"))
                )  # as before the field
        return None

    @property
    def compared(self) -> tuple[int, str, str]:
        """What must be equal."""
        return self.tokens, self.hash, self.byte_count

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens of {self.data} ({self.hash}), {self.byte_count} bytes"


def _common_basis(runs: Sequence[RunData]) -> Basis | None:
    """The basis of all the runs, if it is one."""
    found = [Basis.of(run) for run in runs] or [None]
    alike = len({basis.compared if basis else None for basis in found}) == 1
    return found[0] if alike else None


def _basis_cell(runs: Sequence[RunData]) -> Cell:
    return [str(_common_basis(runs) or ABSENT), "soft"]


def not_compared(runs: Sequence[RunData], groups: Sequence[Group]) -> list[str]:
    """Why BPB of finished runs do not compare, as lines for a person."""
    on: dict[tuple[int, str, str] | None, list[str]] = {}
    names: dict[tuple[int, str, str], str] = {}
    for name, members in groups:
        finished = [
            runs[i] for i in members if np.isfinite(score(runs[i], BPB)) and runs[i].summary
        ]
        if finished:
            basis = _common_basis(finished)
            on.setdefault(basis.compared if basis else None, []).append(name)
            if basis:
                names[basis.compared] = str(basis)
    unknown = on.pop(None, [])
    known = {key: of for key, of in on.items() if key}
    found = []
    if unknown and (known or len(unknown) > 1):
        listed = ", ".join(unknown)
        reason = "because their data are not stated or not equal"
        found.append(f"BPB of {listed}: compared with no other, {reason}")
    if len(known) > 1:
        listed = "; ".join(f"{', '.join(of)} on {names[key]}" for key, of in known.items())
        found.append(f"BPB compares only on the same data, counted alike: {listed}")
    return found


def _mean(values: Sequence[float], form: str) -> Cell:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return NO_NUMBER
    spread = f" ± {np.std(known, ddof=1):{form}}" if len(known) > 1 else ""
    fewer = f" (n = {len(known)})" if len(known) < len(values) else ""
    return [f"{np.mean(known):{form}}{spread}{fewer}", "number"]


def runs_table(runs: Sequence[RunData], groups: Sequence[Group]) -> Table:
    """One row per run, and a row of means before each group of several runs.

    The best BPB of finished runs or means on the same basis is marked.
    """
    shown = [column for column in SCORES if any(np.isfinite(score(run, column)) for run in runs)]
    stated = ["scored on"] if any(map(Basis.of, runs)) else []
    titles = (column.title for column in [*shown, *ALWAYS_SHOWN])
    columns = ["run", "seed", "state", *titles, *stated]
    rows: list[dict[str, Any]] = []
    # by basis, the BPB of groups and single runs, and their rows
    competing: dict[tuple[int, str, str], list[tuple[float, list[Cell]]]] = {}
    for g, (name, members) in enumerate(groups):
        finished = one_per_seed([runs[i] for i in members if runs[i].summary])
        first = len(rows)
        if len(members) > 1:
            seeds = len({runs[i].config[SEED] for i in members})
            again = "" if seeds == len(members) else f", {seeds} seeds"
            row = _words(name, f"{len(members)} runs{again}", f"mean ± sd, n = {len(finished)}")
            for column in shown:
                row.append(_mean([score(run, column) for run in finished], column.form))
            row += [NO_NUMBER] * len(ALWAYS_SHOWN) + [_basis_cell(finished)] * len(stated)
            rows.append({"group": g, "cells": row})
        for i in members:
            run = runs[i]
            row = _words(run.name, text(run.config[SEED]), state(run))
            for column in [*shown, *ALWAYS_SHOWN]:
                row.append(figure(score(run, column), column.form))
            row += [_basis_cell([run])] * len(stated)
            rows.append({"group": g, "run": i, "cells": row})
        scored = [run for run in finished if np.isfinite(score(run, BPB))]
        if scored and (basis := _common_basis(scored)):
            mean = float(np.mean([score(run, BPB) for run in scored]))
            competing.setdefault(basis.compared, []).append((mean, rows[first]["cells"]))
    for compared in competing.values():
        if len(compared) > 1:
            _, best_row = min(compared, key=lambda found: found[0])
            best_row[columns.index(BPB.title)][1] += " best"
    return {"columns": columns, "rows": rows}


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


def config_table(runs: Sequence[RunData], groups: Sequence[Group], only_differing: bool) -> Table:
    """The configurations, one column per group; a group's seeds are a list."""
    sides = []
    for _, members in groups:
        side = {name: text(value) for name, value in runs[members[0]].config.items()}
        seeds = dict.fromkeys(text(runs[i].config[SEED]) for i in members)
        sides.append(side | {SEED: ", ".join(seeds)})
    return side_by_side([group.name for group in groups], sides, only_differing)


def environment_table(runs: Sequence[RunData]) -> Table:
    """The environment of each run's last start, and what a value was at the first start."""
    sides = []
    for run in runs:
        side = {"starts": str(len(run.starts))}
        first, last = (run.starts[0], run.starts[-1]) if run.starts else ({}, {})
        for name in dict.fromkeys([*first, *last]):
            was, now = (text(start.get(name)) for start in (first, last))
            if name == "commit":
                was, now = (re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", x) for x in (was, now))
            title = {"step": "started after step", "time": "started at"}.get(name, name)
            side[title] = now if was == now or name in ("step", "time") else f"{was} → {now}"
        sides.append(side)
    table = side_by_side([run.name for run in runs], sides, only_differing=False)
    for row in table["rows"]:
        if row["cells"][0][0] == "started at":  # differs always
            row["cells"] = _words(*(value for value, _ in row["cells"]))
    return table


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


def _object(value: Any) -> dict[str, Any]:
    """`value`, or an empty object for any other value."""
    return value if isinstance(value, dict) else {}


def export_tables(run: RunData) -> list[Table]:
    """For each export of a run its bytes by group of tensors, under a line of totals."""
    found = []
    columns = ["group", "kept as", *(title for _, title, _ in EXPORTED)]
    for file, value in run.exports:
        total, artifact, program, limit = (
            figure(value.get(key), ",.0f")[0]
            for key in ("total_bytes", "artifact_bytes", "code_bytes", "limit")
        )
        line = f"{run.name} · {file} · {total} bytes · artifact {artifact} · program {program}"
        if number(value.get("limit")) > 0:
            fits = "fits" if value.get("fits") is True else "does not fit"
            line += f" · {fits} the limit of {limit}"
        scores = _object(value.get("score"))
        before, after = (figure(scores.get(key), ".5f")[0] for key in ("bpb_before", "bpb_after"))
        if after != ABSENT:
            gap = figure(scores.get("gap"), "+.5f")[0]
            by = f" ({scores['byte_count']} bytes)" if "byte_count" in scores else ""
            line += f" · BPB{by} {before} before, {after} after, gap {gap}"
        rows = []
        for group, entry in _object(value["bits_per_weight"]).items():
            of = _object(entry)
            words = _words(text(of.get("group") or group), text(of.get("width")))
            figures = (figure(of.get(key), form) for key, _, form in EXPORTED)
            rows.append({"cells": [*words, *figures]})
        found.append({"title": line, "columns": columns, "rows": rows})
    return found


def _evaluations(value: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """What was scored, its scores, and a note, for each score in a result."""
    if "bpb" in value:
        what = text(value["mode"])
        if what == "sliding":
            what += f", stride {text(value.get('stride'))}"
        yield what, value, ""
        ngram = _object(value.get("ngram"))
        if cache := ngram.get("cache"):
            note = f"mass {figure(_object(ngram.get('mass')).get('mean'), '.6g')[0]}"
            if ngram.get("is_distribution") is not True:
                note += ": not a distribution"
            scored = {key: value.get(key) for key in ("tokens", "data")}
            yield f"{what}, {text(cache)} cache", ngram | scored, note
    for task, metrics in _object(value.get("tasks")).items():
        if isinstance(metrics, dict):
            yield task, {}, ", ".join(f"{key} {text(of)}" for key, of in metrics.items())


def _data(scores: Mapping[str, Any]) -> str:
    """The name and the hash of what a result scored."""
    match scores.get("data"):
        case {"name": str(name), "hash": str(key)}:
            return f"{name} ({key})"
    return ABSENT


def evaluation_table(runs: Sequence[RunData]) -> Table:
    """One row per score of a validation stream and per task."""
    rows = []
    for run in runs:
        for file, value in run.evaluations:
            quantized = ", quantized" if value.get("fake_quantized") is True else ""
            kept = text(value.get("weights")) + quantized
            head = [[run.name, ""], [file, "soft"], figure(value.get("step"), ",.0f"), [kept, ""]]
            for what, scores, note in _evaluations(value):
                figures = [figure(scores.get(key), ".4f") for key in ("loss", "bpb")]
                tokens = [figure(scores.get("tokens"), ",.0f"), [_data(scores), "soft"]]
                rows.append({"cells": [*head, [what, ""], *tokens, *figures, [note, ""]]})
    columns = ["run", "file", "step", "weights", "what", "tokens", "of", "loss", "BPB", ""]
    return {"columns": columns, "rows": rows}
