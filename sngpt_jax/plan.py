"""What a recipe costs before it runs: `python -m sngpt_jax.plan --config golf_baseline`.

The counts follow from shapes alone, and nothing runs on a device. `--topology h100x8` also compiles
the training step for those GPUs (`ahead.step`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sngpt_jax.ahead.cases import InspectArguments
from sngpt_jax.base import cli
from sngpt_jax.config import PathText
from sngpt_jax.config.command import parse
from sngpt_jax.config.options import Json, Quiet
from sngpt_jax.config.recipe import Overrides, named_fields, parse_command


@dataclass(frozen=True)
class PlanArguments:
    config: PathText  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    # GPUs to compile the training step for, which this machine need not have, such as h100x1,
    # h100x8, h200x2, a100x8 or b200x8
    topology: str = ""
    json: Json = ""
    quiet: Quiet = False


def main(argv: Sequence[str]) -> int:
    argv = cli.expand_json(argv)
    if "--kernels" in argv:
        return plan_kernels([argument for argument in argv if argument != "--kernels"])
    arguments = parse_command(
        PlanArguments,
        argv,
        program="python -m sngpt_jax.plan",
        description=(
            "Parameters, FLOPs and bytes of a recipe, the optimizer of each tensor, and the cost of"
            " a step on given GPUs. With --kernels it compiles the kernels instead of a step; plan"
            " --kernels --help explains the options of that."
        ),
    )
    config, as_text = arguments.overrides, arguments.json != "-"
    cli.check_json(arguments.json)
    cli.log_to_stderr(arguments.quiet)
    # jax takes seconds to import, and --help does not need it
    from sngpt_jax.ahead import step
    from sngpt_jax.cluster.mesh import make_mesh
    from sngpt_jax.data.prepared import from_folder
    from sngpt_jax.training.cost import format_plan, make_plan
    from sngpt_jax.training.state import Shapes

    if Path(config.data.dir).is_dir():
        config = from_folder(config, named_fields(argv))
    target = step.parse(arguments.topology, config) if arguments.topology else None
    shapes = Shapes.of(config, make_mesh())
    plan = make_plan(shapes)
    if as_text:
        print(format_plan(shapes, plan), flush=True)
    if target:
        plan["topology"] = step.describe(config, *target)
        if as_text:
            print("", step.format_topology(plan["topology"]), sep="\n")
    cli.write_json(plan, arguments.json)
    return 0


def plan_kernels(argv: Sequence[str]) -> int:
    """`plan --kernels`, which has options of its own."""
    arguments = parse(
        InspectArguments,
        argv,
        program="python -m sngpt_jax.plan --kernels",
        description=(
            "Compiles the kernels for GPUs that this machine need not have, and prints the"
            " registers, memory and instructions of each."
        ),
    )
    cli.check_json(arguments.json)
    from sngpt_jax.ahead import kernels

    return kernels.run(arguments)


if __name__ == "__main__":
    cli.run(main)
