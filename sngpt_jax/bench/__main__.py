"""Measurements on the device at hand: `python -m sngpt_jax.bench --config C`, or `bench NAME …`.

Each benchmark is the module of its name. Its `measure(arguments, say)` returns the JSON result and
says its lines as it goes.
"""

import importlib.util
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import arguments as options
from sngpt_jax.config.command import parse
from sngpt_jax.config.recipe import parse_command

NAMES: dict[str, type] = {
    "step": options.StepArguments,
    "kernels": options.KernelsArguments,
    "tune": options.TuneArguments,
    "compiled": options.CompiledArguments,
    "export": options.ExportArguments,
    "policies": options.PoliciesArguments,
    "scoring": options.ScoringArguments,
    "first-light": options.FirstLightArguments,
    "all": options.AllArguments,
}


def arguments_of(name: str, argv: Sequence[str]) -> Any:
    """The options of benchmark `name`."""
    kind, program = NAMES[name], "python -m sngpt_jax.bench" + f" {name}" * (name != "step")
    if issubclass(kind, options.RecipeArguments):
        return parse_command(kind, argv, program=program, description=inspect.getdoc(kind) or "")
    return parse(kind, argv, program=program)


def measure(name: str, arguments: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of benchmark `name`."""
    if name == "all":
        return measure_all(arguments, say)
    # jax takes seconds to import, which --help does not need
    return importlib.import_module(f"sngpt_jax.bench.{name.replace('-', '_')}").measure(
        arguments, say
    )


def measure_all(arguments: options.AllArguments, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of each benchmark by name, or the reason why it was left out."""
    recipe = arguments.config, arguments.overrides
    compared = importlib.util.find_spec("torch") and arguments.overrides.model.family == "compact"
    parts: dict[str, Any] = {
        "step": options.StepArguments(*recipe, against="torch" if compared else "none"),
        "kernels": options.KernelsArguments(quick=True),
        "export": options.ExportArguments(*recipe),
        "scoring": options.ScoringArguments(*recipe),
    }
    if arguments.run:
        parts["policies"] = options.PoliciesArguments(arguments.run)
    result: dict[str, Any] = {}
    for name, part in parts.items():
        say(f"== {name}")
        start = time.monotonic()
        try:
            result[name] = measure(name, part, say)
        except UserError as reason:  # such as data that are not prepared
            result[name] = {"left_out": str(reason)}
            say(f"left out: {reason}")
        say(f"{name} took {time.monotonic() - start:.0f} s\n")
    return result


def main(argv: Sequence[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv and argv[0] in NAMES else ("step", argv)
    arguments = arguments_of(name, cli.expand_json(rest))
    for option in ("batches", "repeats", "rounds", "steps"):
        if getattr(arguments, option, 1) < 1:
            raise UserError(f"--{option} must be 1 or more")
    cli.check_json(arguments.json)
    # the kernels would log every implementation that they try
    cli.log_to_stderr(getattr(arguments, "quiet", True))
    say = cli.progress if arguments.json == "-" else lambda line: print(line, flush=True)
    result = measure(name, arguments, say)
    cli.write_json(result, arguments.json)
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]  # of `all`
    return int(any("failed" in row for part in parts for row in part.get("rows", ())))


if __name__ == "__main__":
    cli.run(main)
