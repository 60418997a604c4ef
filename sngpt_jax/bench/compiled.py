"""The training steps compiled for GPUs, beside those of an older commit: `bench compiled`.

No GPU is needed and no time is measured. `compiled_442cc0a.json` has the older figures, per device
and step: bytes that the kernels move, the roofline's bound, and kernels launched.
"""

import json
from pathlib import Path
from typing import Any

from sngpt_jax.ahead import step
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench.arguments import CompiledArguments
from sngpt_jax.bench.harness import Say, table_head, table_row
from sngpt_jax.config.recipe import load

BASELINE = Path(__file__).with_name("compiled_442cc0a.json")
# the largest ratios aimed at: by one-pass kernels, bytes 0.79; with products that have an epilogue,
# bytes 0.72
AIMS = {"bytes": 0.79, "bound_seconds": 0.80, "launches": 0.60}


def figures(name: str, topology: str) -> dict[str, float]:
    """The figures of the recipe `name` compiled for `topology`, such as h100x8."""
    config = load(name)
    described = step.describe(config, *step.parse(topology, config))
    return {
        "bytes": described["bytes"],
        "bound_seconds": described["roofline"]["step_seconds"],
        "launches": sum(described["launches"].values()),
    }


def row(name: str, now: dict[str, float], before: dict[str, float]) -> str:
    """A recipe's row of the table."""
    ratios = [f"{now[key] / before[key]:.3f}" for key in AIMS]
    moved, bound, launches = now["bytes"] / 1e9, now["bound_seconds"] * 1e3, now["launches"]
    return table_row([f"`{name}`", f"{moved:.1f}", f"{bound:.1f}", f"{launches:,.0f}", *ratios])


def measure(arguments: CompiledArguments, say: Say) -> dict[str, Any]:
    """The figures now and at the older commit, by recipe.

    Raises `UserError` for a recipe without older figures, and without the CUDA plugin.
    """
    older = json.loads(BASELINE.read_text())
    baseline, topology = older["recipes"], older["topology"]
    names = arguments.recipes or tuple(baseline)
    if unknown := [name for name in names if name not in baseline]:
        raise UserError(
            f"--recipes: {BASELINE.name} has no figures of {', '.join(unknown)}; it has those of"
            f" {', '.join(baseline)}"
        )
    say(f"per device and step on {topology}; the aims are for the golf recipes")
    titles = ["recipe", "GB moved", "bound, ms", "kernels launched"]
    ratios = zip(("bytes", "bound", "launches"), AIMS.values(), strict=True)
    say(table_head([*titles, *(f"{name} ratio, aim {aim:.2f}" for name, aim in ratios)]))
    result = {}
    for name in names:
        result[name] = {"now": figures(name, topology), "before": baseline[name]}
        say(row(name, result[name]["now"], baseline[name]))
    return {"topology": topology, "recipes": result}
