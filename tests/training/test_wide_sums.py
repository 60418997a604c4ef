"""No recipe's gradient asks for a sum in bfloat16: in the traced program, without a compiler.

XLA may narrow or split a sum later. `tests/deviceless/test_recipes.py` compiles steps for an H100
and reads what is left.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sngpt_jax.config import changed
from sngpt_jax.config.recipe import load
from sngpt_jax.model.forward import abstract_parts, join, losses
from tests.config.test_recipes import equations

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py"))
RECIPES = [name for name in NAMES if "large" not in name]  # these are cayley_small_* but for sizes
SUMS = ("reduce_sum", "scatter-add", "cumsum", "reduce_window_sum", "psum")


HEAD = 64  # numbers of a head: the attention gate's gradient adds so few per token


def summands(equation):
    """How many numbers a result of the sum adds at most."""
    if equation.primitive.name != "reduce_sum":
        return math.inf
    return math.prod(equation.invars[0].aval.shape[axis] for axis in equation.params["axes"])


def narrow_sums(function, *arguments):
    """The sums of more than `HEAD` bfloat16 numbers in the program of `function`."""
    found = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    return [
        f"{equation.primitive.name} {equation.invars[0].aval} at {equation.source_info.name_stack}"
        for equation in found
        if equation.primitive.name in SUMS
        and equation.outvars[0].aval.dtype == jnp.bfloat16
        and summands(equation) > HEAD
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_added_in_float32(name):
    model = changed(load(name), model={"compute_dtype": "bfloat16"}).model
    params, statistics = abstract_parts(model)

    def loss(params, statistics, inputs, targets):
        return losses(model)(join(params, statistics), inputs, targets).mean()

    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    assert not narrow_sums(jax.grad(loss), params, statistics, tokens, tokens)


def test_a_table_that_is_cast_before_the_lookup_is_found():
    table, tokens = jnp.ones((8, 4)), jnp.zeros(16, jnp.int32)

    def rows(table, first):
        return (table.astype(first)[tokens].astype(jnp.float32) ** 2).sum()

    for first, count in ((jnp.bfloat16, 1), (jnp.float32, 0)):
        found = narrow_sums(jax.grad(lambda t, first=first: rows(t, first)), table)
        assert len(found) == count, found
