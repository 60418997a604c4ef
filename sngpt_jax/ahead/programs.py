"""The cases that there are, and their programs: what inspection compiles and the benchmark times."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from sngpt_kernels.case import Case, Cost

from sngpt_jax.ahead.targets import Target
from sngpt_jax.base.errors import UserError

OPERATIONS = ("cayley", "xsa")
PASSES = ("forward", "forward_backward")


def parser(module: str, description: str) -> argparse.ArgumentParser:
    """What every command of the cases takes: the operations, --case and --json."""
    taken = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    taken.add_argument(
        "operation", nargs="*", help=f"which: {', '.join(OPERATIONS)} (default: all)"
    )
    taken.add_argument("--case", help="only the case of this name")
    taken.add_argument(
        "--json",
        nargs="?",
        const="-",
        default="",
        metavar="PATH",
        help="print one JSON object, or write it to PATH",
    )
    return taken


def select(operations: Sequence[str], name: str | None) -> list[tuple[str, Case]]:
    """(operation, case) of all cases of these operations, of all where there are none; only the
    one called `name`, if given.

    Raises `UserError` where there is no such operation or case.
    """
    for operation in operations:
        if operation not in OPERATIONS:
            raise UserError(
                f"there is no operation {operation!r}; expected {' or '.join(OPERATIONS)}"
            )
    found = [
        (operation, case)
        for operation in operations or OPERATIONS
        for case in importlib.import_module(f"sngpt_kernels.{operation}.specs").CASES
    ]
    if name is None:
        return found
    if name not in {case.name for _, case in found}:
        raise UserError(
            f"--case {name}: there is none; expected one of:"
            f" {', '.join(case.name for _, case in found)}"
        )
    return [(operation, case) for operation, case in found if case.name == name]


def cost(case: Case, which: str) -> Cost:
    """What that pass must do at least."""
    if which == "forward":
        return case.forward
    return Cost(
        case.forward.matmul_flops + case.backward.matmul_flops,
        case.forward.bytes + case.backward.bytes,
    )


def limit(case: Case, which: str, target: Target) -> float:
    """Seconds that the pass takes at least on the target. Products of float32 run as TF32 there,
    at half of bfloat16's rate.
    """
    least = cost(case, which)
    slower = 2 if case.abstract()[0].dtype == jnp.float32 else 1
    return target.roofline(slower * least.matmul_flops, least.bytes)


def function(case: Case, implementation: str, which: str) -> Callable[..., Any]:
    """The case's operation as a function of its arguments.

    For "forward_backward" its first argument is the gradient with respect to the output; it
    returns the output and the gradients with respect to the differentiated arguments.
    """

    def forward(*arguments: jax.Array) -> jax.Array:
        return case.run(*arguments, implementation=implementation)

    def forward_backward(
        cotangent: jax.Array, *arguments: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def of(*differentiated: jax.Array) -> jax.Array:
            every = list(arguments)
            for position, value in zip(case.differentiated, differentiated, strict=True):
                every[position] = value
            return case.run(*every, implementation=implementation)

        output, vjp = jax.vjp(of, *(arguments[position] for position in case.differentiated))
        return output, vjp(cotangent)

    return forward if which == "forward" else forward_backward


def abstract_arguments(case: Case, which: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes that `function` takes. The output's are those of the implementation in
    plain XLA.
    """
    arguments = case.abstract()
    if which == "forward":
        return arguments
    output = jax.eval_shape(function(case, "xla", "forward"), *arguments)
    return (jax.ShapeDtypeStruct(output.shape, output.dtype), *arguments)
