"""Trains a recipe's model: `python -m sngpt_jax.train --config configs/quickstart.py`.

`training.trainer` holds the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sngpt_jax.base import cli
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.config import PathText
from sngpt_jax.config.options import KernelsOption, Quiet
from sngpt_jax.config.recipe import Overrides, named_fields, parse_command, recipe_name


@dataclass(frozen=True)
class TrainArguments:
    config: PathText  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    run_dir: PathText = ""  # folder in which the run is kept and resumed; default: runs/NAME
    kernels: KernelsOption = "check"
    quiet: Quiet = False
    processes: Annotated[ProcessArguments, tyro.conf.arg(name="")] = field(
        default_factory=ProcessArguments
    )


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        TrainArguments,
        argv,
        program="python -m sngpt_jax.train",
        description="Trains a recipe's model. The same command resumes from the last checkpoint.",
    )
    directory = Path(arguments.run_dir or Path("runs") / recipe_name(arguments.config))
    again = cli.command("sngpt_jax.train", *argv)
    cli.log_to_stderr(arguments.quiet)
    # jax takes seconds to import; --help needs none
    from sngpt_jax.data.prepared import from_folder
    from sngpt_jax.training import trainer

    return trainer.run(
        from_folder(arguments.overrides, named_fields(argv)),
        directory,
        arguments.processes,
        quiet=arguments.quiet,
        again=again,
        kernels=arguments.kernels,
    )


if __name__ == "__main__":
    cli.run(main)
