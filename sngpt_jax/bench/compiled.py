"""The training steps compiled for GPUs, beside those of an older commit: `bench compiled`.

No GPU is needed and no time is measured. `compiled_442cc0a.json` has the older figures, per device
and step: bytes that the kernels move, the roofline's bound, and kernels launched. For the sparse
codes' kernels it has warp instructions and barriers per token. Compact recipes have a second row
with `model.mlp = pallas_triton`, whose matrix products have epilogues.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from sngpt_jax.ahead import by_loop, step
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench.arguments import CompiledArguments
from sngpt_jax.bench.harness import Say, table_head, table_row
from sngpt_jax.config import Config, changed
from sngpt_jax.config.recipe import load

BASELINE = Path(__file__).with_name("compiled_442cc0a.json")
# the largest ratios aimed at; "with products" by `model.mlp = pallas_triton`
AIMS = {"bytes": 0.79, "bound_seconds": 0.80, "launches": 0.60}
AIM_WITH_PRODUCTS = 0.72  # of bytes


def figures(config: Config, topology: str) -> dict[str, float]:
    """The figures of a recipe compiled for `topology`, such as h100x8."""
    described = step.describe(config, *step.parse(topology, config))
    return {
        "bytes": described["bytes"],
        "bound_seconds": described["roofline"]["step_seconds"],
        "launches": sum(described["launches"].values()),
    }


def instructions(case: str, target: str) -> dict[str, tuple[float, float]]:
    """Warp instructions and barriers per token of the Cayley kernels, by name.

    Another process counts them: this one compiles a kernel once. Raises `UserError` if it cannot.
    """
    chosen = ["--kernels", "cayley", "--case", case, "--target", target, "--sass", "--json"]
    command = [sys.executable, "-m", "sngpt_jax.plan", *chosen]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise UserError(done.stderr.strip().rpartition("error: ")[2])
    *_, program = json.loads(done.stdout)["cases"][0]["programs"]
    counted = (kernel for kernel in program["kernels"] if "by_loop" in kernel)
    return {kernel["name"]: by_loop.totals(kernel["by_loop"])[:2] for kernel in counted}


def row(name: str, products: str, now: dict[str, float], before: dict[str, float]) -> str:
    """A recipe's row of the table."""
    ratios = [f"{now[key] / before[key]:.3f}" for key in AIMS]
    moved, bound, launches = now["bytes"] / 1e9, now["bound_seconds"] * 1e3, now["launches"]
    figures = f"{moved:.1f}", f"{bound:.1f}", f"{launches:,.0f}"
    return table_row([f"`{name}`", f"`{products}`", *figures, *ratios])


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
    titles = ["recipe", "`model.mlp`", "GB moved", "bound, ms", "kernels launched"]
    ratios = zip(("bytes", "bound", "launches"), AIMS.values(), strict=True)
    aims = [f"{name} ratio, aim {aim:.2f}" for name, aim in ratios]
    aims[0] += f", with products {AIM_WITH_PRODUCTS}"
    say(table_head([*titles, *aims]))
    result: dict[str, Any] = {}
    for name in names:
        config = load(name)
        ways = {"xla": "now", "pallas_triton": "with_products"}
        if config.model.family != "compact":  # the kernels are for compact blocks
            del ways["pallas_triton"]
        result[name] = {"before": baseline[name]}
        for products, way in ways.items():
            result[name][way] = figures(changed(config, model={"mlp": products}), topology)
            say(row(name, products, result[name][way], baseline[name]))
    found: dict[str, Any] = {"topology": topology, "recipes": result}
    then = older["instructions"]
    if then["case"] in names:
        now = found["instructions"] = instructions(then["case"], then["target"])
        say(f"\nper token and layer of {then['case']} on {then['target']}")
        say(table_head(["kernel", "warp instructions", "ratio", "barriers", "before"]))
        for kernel, (count, barriers) in now.items():
            old_count, old_barriers = then["kernels"][kernel]
            cells = f"{count:,.0f}", f"{count / old_count:.3f}", f"{barriers:.0f}"
            say(table_row([f"`{kernel}`", *cells, f"{old_barriers:.0f}"]))
    return found
