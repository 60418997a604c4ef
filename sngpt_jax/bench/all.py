"""Every benchmark that this machine can run, one after the other."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import arguments as options
from sngpt_jax.bench import export, kernels, policies, scoring, step
from sngpt_jax.bench.harness import Say, environment


def measure(arguments: options.AllArguments, say: Say) -> dict[str, Any]:
    """The result of each benchmark by name, or the reason why it was left out."""
    recipe = arguments.config, arguments.overrides
    compared = importlib.util.find_spec("torch") and arguments.overrides.model.family == "compact"
    against = options.StepArguments(*recipe, against="torch" if compared else "none")
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "step": lambda: step.measure(against, say),
        "kernels": lambda: kernels.measure(options.KernelsArguments(quick=True), say),
        "export": lambda: export.measure(options.ExportArguments(*recipe), say),
        "scoring": lambda: scoring.measure(options.ScoringArguments(*recipe), say),
    }
    if arguments.run:
        compare = options.PoliciesArguments(arguments.run)
        works["policies"] = lambda: policies.measure(compare, say)
    result: dict[str, Any] = environment()
    for name, work in works.items():
        say(f"== {name}")
        start = time.monotonic()
        try:
            result[name] = work()
        except UserError as reason:  # such as data that are not prepared
            result[name] = {"left_out": str(reason)}
            say(f"left out: {reason}")
        say(f"{name} took {time.monotonic() - start:.0f} s\n")
    return result
