"""What a recipe costs before it runs: `python -m sngpt_jax.plan --config golf_baseline [--topology
h100x8]`.

Counts follow from the shapes alone. With a topology the training step is compiled for it too
(`topology.py`). Nothing is computed on a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sngpt_jax.ahead import kernels
from sngpt_jax.ahead import step as topology
from sngpt_jax.base import cli
from sngpt_jax.config import Config
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.config.recipe import Overrides, parse_command
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.training.cost import abstract_params, make_plan


def format_plan(config: Config, plan: dict[str, Any]) -> str:
    """The plan for a person."""
    p, f, b, t = plan["parameters"], plan["flops_per_token"], plan["bytes"], plan["tokens"]
    shares = ", ".join(
        f"{name} {count:,}"
        for name, count in p.items()
        if name not in ("total", "backbone") and count
    )
    backbone = f"; backbone {p['backbone']:,}" if p["backbone"] != p["total"] else ""
    step, run = plan["flops_per_step"], config.train.steps
    lines = [
        f"parameters   {p['total']:,} ({shares}){backbone}",
        f"FLOPs        {f['forward'] / 1e6:,.1f} M a token forward, {f['train'] / 1e6:,.1f} M in"
        " training"
        + (f"; beside them the codes' {f['code'] / 1e6:,.1f} M forward" if f["code"] else ""),
        (
            f"step         {t['step']:,} tokens, {step['model'] / 1e12:,.3f} TFLOP"
            f" and {step['optimizer'] / 1e12:,.3f} TFLOP to orthogonalize"
            f" ({step['optimizer'] / (step['model'] + step['optimizer']):.2%} of both)"
        ),
        (
            f"run          {run:,} steps, {t['run'] / 1e9:,.3f} G tokens,"
            f" {step['model'] * run / 1e18:,.4f} EFLOP"
        ),
        (
            f"memory       in all: parameters {b['parameters'] / 1e6:,.1f} MB, optimizer"
            f" {b['optimizer'] / 1e6:,.1f} MB, averages {b['averages'] / 1e6:,.1f} MB, statistics"
            f" {b['statistics'] / 1e6:,.1f} MB, checkpoint {b['checkpoint'] / 1e6:,.1f} MB"
        ),
        "",
        format_table(describe(config.optim, abstract_params(config))),
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class PlanArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    # GPUs to compile the training step for, which need not be here: h100x1, h100x8, h200x2,
    # a100x8, b200x8
    topology: str = ""
    json: Json = ""
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    if "--kernels" in argv:
        return kernels.main([argument for argument in argv if argument != "--kernels"])
    arguments = parse_command(
        PlanArguments,
        cli.expand_json(argv),
        program="python -m sngpt_jax.plan",
        description=(
            "Parameters, FLOPs and bytes of a recipe, how each tensor is optimized, what a step"
            " takes on given GPUs."
        ),
    )
    config = arguments.overrides
    cli.check_json(arguments.json)
    cli.log_to_stderr(arguments.quiet)
    target = topology.parse(arguments.topology, config) if arguments.topology else None
    plan = make_plan(config)
    if arguments.json != "-":
        print(format_plan(config, plan), flush=True)
    if target:
        plan["topology"] = topology.describe(config, *target)
        if arguments.json != "-":
            print("", topology.format_topology(plan["topology"]), sep="\n")
    cli.write_json(plan, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
