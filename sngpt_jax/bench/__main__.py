"""Measurements on the device at hand: `python -m sngpt_jax.bench --config C`, or `bench NAME …`.

Each benchmark is the module of its name. Its `measure(arguments, say)` returns the JSON result and
says its lines as it goes.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import tyro

from sngpt_jax.ahead.cases import CaseArguments
from sngpt_jax.base import cli
from sngpt_jax.bench import arguments as options
from sngpt_jax.config.recipe import parse_command

NAMES: dict[str, tuple[type, str]] = {
    "step": (
        options.StepArguments,
        "Times the training step of a recipe, alone or beside the same model in PyTorch. Other"
        " benchmarks: bench kernels | tune | export | policies | scoring | all.",
    ),
    "kernels": (
        options.KernelsArguments,
        "Times every implementation of every kernel operation, with its error and the device's"
        " limit beside each time.",
    ),
    "tune": (
        CaseArguments,
        "Finds the kernels' fastest block sizes on this device and writes tuned/<device>.json.",
    ),
    "export": (
        options.ExportArguments,
        "Times the export of a model with drawn weights and prints the size of its artifact.",
    ),
    "policies": (
        options.PoliciesArguments,
        "Exports one trained model by several policies and compares their bits, bytes and scores.",
    ),
    "scoring": (
        options.ScoringArguments,
        "Times the scoring of a recipe's model, and the n-gram caches.",
    ),
    "all": (
        options.AllArguments,
        "Runs every benchmark that this machine can run, one after the other.",
    ),
}


def parse(name: str, argv: Sequence[str]) -> Any:
    """The options of benchmark `name`."""
    kind, description = NAMES[name]
    program = "python -m sngpt_jax.bench" + f" {name}" * (name != "step")
    if issubclass(kind, options.RecipeArguments):
        return parse_command(kind, argv, program=program, description=description)
    return tyro.cli(kind, args=argv, prog=program, description=description)


def main(argv: Sequence[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in NAMES else ("step", argv)
    arguments = parse(name, cli.expand_json(rest))
    cli.check_json(arguments.json)
    # the kernels would log every implementation that they try
    cli.log_to_stderr(getattr(arguments, "quiet", True))
    say = cli.progress if arguments.json == "-" else lambda line: print(line, flush=True)
    # jax takes seconds to import, which --help does not need
    result = importlib.import_module(f"sngpt_jax.bench.{name}").measure(arguments, say)
    cli.write_json(result, arguments.json)
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]  # of `all`
    return int(any("failed" in row for part in parts for row in part.get("rows", ())))


if __name__ == "__main__":
    cli.run(main)
