"""The parts of first light: `python -m sngpt_jax.bench.first_light_parts NAME --out FILE`.

A part returns its result, and keeps what it has in the file as it goes. "problem" says what is
wrong, and "skipped" why there was nothing to do. "markdown" is a table for a document.
"""

import importlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import tyro
from sngpt_kernels import dispatch, parity
from sngpt_kernels.case import Case

from sngpt_jax.ahead.cases import CaseArguments, select
from sngpt_jax.base import cli
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.bench import harness, kernels, tune
from sngpt_jax.bench.first_light_steps import (
    Keep,
    Result,
    against_torch,
    attempt,
    compare_steps,
    one_microbatch,
    problems,
    table,
    train_twice,
    training_overrides,
)
from sngpt_jax.config import Config
from sngpt_jax.config.command import parse

RECIPES = {
    "gpu": (
        *("golf_12l_recycled", "cayley_small_3l", "golf_9l_xsa_ngram", "golf_11l_xsa4"),
        *("golf_10l_int5mlp", "golf_baseline", "cayley_small_2l", "cayley_small_1l"),
    ),
    "cpu": ("quickstart", "quickstart_cayley"),
}
COMPARED = {"gpu": "golf_9l_xsa_ngram", "cpu": "quickstart"}  # with PyTorch


@dataclass(frozen=True)
class PartArguments:
    name: tyro.conf.Positional[Literal["parity", "step", "kernels", "tune", "torch", "train"]]
    out: Path  # file for the result
    device: Literal["gpu", "cpu"] = "gpu"
    recipe: str = ""
    data: str = ""


def interpreted(case: Case) -> Case:
    """An XSA case whose Triton kernels run in interpretation, which any device can."""
    from sngpt_kernels.epilogue.api import finish
    from sngpt_kernels.xsa import pallas_triton

    options = getattr(case.run, "keywords")  # noqa: B009  # `run` is a partial

    def run(*arguments: jax.Array, implementation: str) -> jax.Array:
        if implementation != "pallas_triton":
            return case.run(*arguments, implementation=implementation)
        q, k, v = arguments
        y = pallas_triton.attention(q, k, v, options["scale"], interpret=True)
        return finish(y, v if options["exclusive"] else None)

    return replace(case, run=run)


def cases(device: str) -> list[tuple[str, Case]]:
    """The operations' cases on a GPU; on a CPU the quickstart's attention."""
    if device == "gpu":
        return select(CaseArguments())
    return select(CaseArguments(operation=("xsa",), case="quickstart"))


def compare(case: Case, implementation: str) -> Result:
    """The errors of an implementation's values and gradients, and what is wrong with them."""
    rows = parity.rows_within(case)
    found = parity.compare(case, implementation, jax.random.key(1), rows=rows)
    errors = {one.result: one.error for one in found.differences}
    bounds = {one.result: one.bound for one in found.differences}
    return {"problem": found.problem, "errors": errors, "bounds": bounds, "ties": found.ties}


def compare_kernels(chosen: Sequence[tuple[str, Case]], keep: Keep) -> Result:
    """Compares every implementation that has kernels of its own with float32 XLA."""
    result: Result = harness.environment()
    rows: list[Result] = []
    result["comparisons"] = rows
    for operation, case in chosen:
        for implementation in sorted({*case.implementations} - {"xla"}):
            start = time.monotonic()
            row: Result = {"title": f"{operation} {case.name} {implementation}"}
            row |= attempt(partial(compare, case, implementation))
            row["seconds"] = round(time.monotonic() - start, 1)
            rows.append(row)
            cells = []
            for done in rows:
                errors = ", ".join(f"{name} {x:.1e}" for name, x in done.get("errors", {}).items())
                verdict = done.get("problem") or done.get("cannot_serve") or "right"
                cells.append((done["title"], verdict.replace("|", "/"), errors))
            device = f"{result['device']}, jax {result['jax']}, {result['platform_version']}\n\n"
            result["markdown"] = device + table(("kernel", "verdict", "largest errors"), cells)
            keep(result | problems(rows))
    if not any("errors" in row for row in rows):
        return result | {"problem": "no kernel was compared"} | problems(rows)
    return result | problems(rows)


def time_kernels(chosen: Sequence[tuple[str, Case]], keep: Keep) -> Result:
    """The table of `bench kernels`, case by case."""
    result: Result = harness.environment() | {"rows": []}
    for pair in chosen:
        result["rows"] += kernels.run_table([pair], kernels.QUICK_ROUNDS, print)
        result["markdown"] = kernels.format_markdown(result)
        named = [
            {"title": f"{row['case']} {row['implementation']}", "problem": row.get("failed")}
            for row in result["rows"]
        ]
        keep(result | problems(named))
    return result | problems(named)


def tune_kernels(chosen: Sequence[tuple[str, Case]], folder: Path, keep: Keep) -> Result:
    """Measures the choice tables, and copies them into `folder`."""
    result: Result = {"entries": {}}
    name = dispatch.table_name(jax.devices()[0].device_kind)
    for operation, case in sorted(chosen, key=lambda pair: -pair[1].forward.bytes):
        for entries in tune.tune_all([(operation, case)]).values():
            result["entries"].setdefault(operation, {}).update(entries)
        package = importlib.import_module(f"sngpt_kernels.{operation}")
        if (path := Path(package.__path__[0], "tuned", name)).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{operation}_{name}")
        keep(result)
    if not any(result["entries"].values()):
        return {"skipped": "no kernel with block sizes runs on this device"}
    return result


def main(argv: Sequence[str]) -> int:
    a = parse(PartArguments, argv, program="python -m sngpt_jax.bench.first_light_parts")
    cli.log_to_stderr()

    def keep(result: Result) -> None:
        write_text_atomic(a.out, json.dumps(result, indent=2) + "\n")

    config = one_microbatch(a.recipe, a.device) if a.recipe else Config()
    data = a.data or str(a.out.with_suffix(".data"))
    chosen = cases(a.device)
    compared = chosen
    if a.device == "cpu":
        compared = [(operation, interpreted(case)) for operation, case in chosen]
    works: dict[str, Callable[[], Result]] = {
        "parity": lambda: compare_kernels(compared, keep),
        "step": lambda: compare_steps(a.recipe, config, a.out, keep),
        "kernels": lambda: time_kernels(chosen, keep),
        "tune": lambda: tune_kernels(chosen, a.out.parent / "tuned", keep),
        "torch": lambda: against_torch(a.recipe, config),
        "train": lambda: train_twice(
            a.out.with_suffix(".runs"), training_overrides(a.device, data), keep
        ),
    }
    result = works[a.name]()
    keep(result)
    return int(bool(result.get("problem")))


if __name__ == "__main__":
    cli.run(main)
