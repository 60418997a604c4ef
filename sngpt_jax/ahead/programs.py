"""The programs of a case: the inspection compiles them, and the benchmark times them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from sngpt_kernels.case import Case, Cost

from sngpt_jax.ahead.targets import Target

PASSES = ("forward", "forward_backward")


def cost(case: Case, which: str) -> Cost:
    """The least work of that pass."""
    if which == "forward":
        return case.forward
    flops = case.forward.matmul_flops + case.backward.matmul_flops
    return Cost(flops, case.forward.bytes + case.backward.bytes)


def limit(case: Case, which: str, target: Target) -> float:
    """The least seconds of the pass on the target.

    Products of float32 run there as TF32, at half the rate of bfloat16.
    """
    least = cost(case, which)
    slower = 2 if case.abstract()[0].dtype == jnp.float32 else 1
    return target.roofline(slower * least.matmul_flops, least.bytes)


def function(case: Case, implementation: str, which: str) -> Callable[..., Any]:
    """The case's operation as a function of its arguments.

    For "forward_backward" the first argument is the gradient with respect to the output. The
    function then returns the output and the gradients of the differentiated arguments.
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
            return forward(*every)

        output, vjp = jax.vjp(of, *(arguments[position] for position in case.differentiated))
        return output, vjp(cotangent)

    return forward if which == "forward" else forward_backward


def abstract_arguments(case: Case, which: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes and dtypes of the arguments of `function`, with the output's in plain XLA."""
    arguments = case.abstract()
    if which == "forward":
        return arguments
    output = jax.eval_shape(function(case, "xla", "forward"), *arguments)
    return (jax.ShapeDtypeStruct(output.shape, output.dtype), *arguments)


def argument_bytes(case: Case, which: str) -> int:
    """The bytes of the arguments of `function`."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in abstract_arguments(case, which))


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
