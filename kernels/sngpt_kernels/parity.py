"""The comparison of an implementation with `xla`, on the device that runs it.

No rounding of `xla` counts as an error: it gets the same arguments in float32, with full float32
products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sngpt_kernels.case import Case

# The largest difference that rounding explains, per dtype of the output: for bfloat16 some
# roundings of 2^-9, for float32 more than three TF32 products make and less than one makes.
BOUNDS = {"bfloat16": 2.0**-6, "float32": 2.0**-14}


TOKENS = 4096  # compared at most, in whole rows


@dataclass(frozen=True)
class Difference:
    """How far one result is from that of `xla`."""

    result: str  # value, or gradient of argument 0
    error: float  # the largest difference by the largest element; or by root mean squares, if more
    bound: float

    @property
    def fits(self) -> bool:
        return self.error <= self.bound  # not if the error is NaN


@dataclass(frozen=True)
class Parity:
    """An implementation's comparison with `xla`."""

    differences: tuple[Difference, ...]
    ties: float  # share of the output's rows with another discrete choice
    most_ties: float

    @property
    def problem(self) -> str:
        """The first wrong result, value before gradients, with its error; empty if none is."""
        if not self.ties <= self.most_ties:
            share = f"{self.ties:.1%} of its rows differ from xla's"
            return f"{share}; ties explain at most {self.most_ties:.1%}"
        wrong = next((one for one in self.differences if not one.fits), None)
        if wrong is None:
            return ""
        differs = f"its {wrong.result} differs from xla's by {wrong.error:.1e}"
        return f"{differs} of the largest; rounding explains at most {wrong.bound:.1e}"


def compare(case: Case, implementation: str, key: Array, *, rows: int | None = None) -> Parity:
    """Value and gradients of an implementation beside those of `xla`, on random arguments.

    Args:
      case: the operation and the shapes.
      implementation: the one to compare.
      key: draws the arguments and the cotangent of the output.
      rows: how many of the output's first rows are compared. Rows run along the first axis of the
        output, and of the arguments with as many axes and rows. None: all.

    Raises: what the implementation raises.
    """
    of_arguments, of_cotangent = jax.random.split(key)
    output = jax.eval_shape(lambda *a: case.run(*a, implementation="xla"), *case.abstract())

    @jax.jit
    def draw() -> tuple[list[Array], Array]:
        arguments = [
            a[:rows] if a.ndim == output.ndim and len(a) == output.shape[0] else a
            for a in case.make(of_arguments)
        ]
        count = min(rows or output.shape[0], output.shape[0])
        return arguments, jax.random.normal(of_cotangent, (count, *output.shape[1:]), output.dtype)

    arguments, cotangent = draw()
    mine = _value_and_gradients(case, implementation)
    theirs = _value_and_gradients(case, "xla")
    exact = [_widened(a) for a in arguments]
    value, *gradients = mine(arguments, cotangent)
    with jax.default_matmul_precision("highest"):
        want, *exact_gradients = theirs(exact, _widened(cotangent))
    ties, bound = 0.0, BOUNDS[output.dtype.name]
    if case.ties:  # rows with another choice have other values and gradients
        size = jnp.abs(want).max(axis=-1, keepdims=True)
        other = jnp.abs(_widened(value) - want).max(axis=-1, keepdims=True) > bound * size
        ties = float(other.mean())
        if ties:
            value, want = jnp.where(other, 0, value), jnp.where(other, 0, want)
            cotangent = jnp.where(other, 0, cotangent).astype(cotangent.dtype)
            gradients = mine(arguments, cotangent)[1:]
            with jax.default_matmul_precision("highest"):
                exact_gradients = theirs(exact, _widened(cotangent))[1:]
    names = ["value", *(f"gradient of argument {i}" for i in case.differentiated)]
    pairs = zip((value, *gradients), (want, *exact_gradients), strict=True)
    differences = [_difference(name, *pair, bound) for name, pair in zip(names, pairs, strict=True)]
    return Parity(tuple(differences), ties, case.ties)


def rows_within(case: Case, tokens: int = TOKENS) -> int:
    """The rows of the case's output that hold at most so many tokens; at least one.

    A row of an output [B, T, ..., h] is a sequence, and a row of an output [N, d] is one token.
    """
    shape = jax.eval_shape(lambda *a: case.run(*a, implementation="xla"), *case.abstract()).shape
    return max(1, min(tokens // (shape[1] if len(shape) > 2 else 1), shape[0]))


def _widened(array: Array) -> Array:
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


def _value_and_gradients(case: Case, implementation: str) -> Callable[..., Any]:
    @jax.jit
    def function(arguments: list[Array], cotangent: Array) -> list[Array]:
        def run(*differentiated: Array) -> Array:
            all_arguments = list(arguments)
            for i, array in zip(case.differentiated, differentiated, strict=True):
                all_arguments[i] = array
            return case.run(*all_arguments, implementation=implementation)

        value, vjp = jax.vjp(run, *(arguments[i] for i in case.differentiated))
        return [value, *vjp(cotangent)]

    return function


def _difference(name: str, mine: Array, want: Array, bound: float) -> Difference:
    error, size = jnp.abs(_widened(mine) - want), jnp.abs(want)
    largest = error.max() / jnp.maximum(size.max(), 1e-30)
    squares = jnp.mean(jnp.square(error)) / jnp.maximum(jnp.mean(jnp.square(size)), 1e-30)
    # numpy's maximum keeps NaN
    return Difference(name, float(np.maximum(largest, jnp.sqrt(squares))), bound)
