"""The comparison of an implementation with `xla`: right, wrong in one result, and at ties."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels import dispatch, parity
from sngpt_kernels.case import Case, Cost
from sngpt_kernels.xsa import pallas_triton, specs

ROWS, WIDTH = 16, 8


def make(key):
    return jax.random.normal(key, (ROWS, WIDTH)), jnp.linspace(1.0, 2.0, WIDTH)[None]


def case(run):
    """x · sin(x) · w by `xla`, and `run` by another name."""

    def both(x, w, implementation):
        return x * jnp.sin(x) * w if implementation == "xla" else run(x, w)

    cost = Cost(0, 0)
    return Case("toy", make, both, (0, 1), both, ("xla", "other"), cost, cost)


def right(x, w):
    return jnp.sin(x) * (x * w)


def wrong_gradient(x, w):
    return right(x, w) + 0.01 * (w - jax.lax.stop_gradient(w))


def one_nan(x, w):
    return right(x, w).at[3, 2].set(jnp.nan)


def other_row(x, w):
    return right(x, w).at[1].multiply(-1)


@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (right, ""),
        (lambda x, w: right(x, w) * 1.001, "its value differs from xla's by 1.0e-03"),
        (wrong_gradient, "its gradient of argument 1 differs"),
        (one_nan, "its value differs from xla's by nan"),
        (other_row, "its value differs"),
    ],
)
def test_names_the_first_wrong_result(run, problem):
    found = parity.compare(case(run), "other", jax.random.key(0))
    assert found.problem.startswith(problem) and bool(found.problem) == bool(problem)
    assert next(one.result for one in found.differences) == "value"


def test_rows_of_another_choice_count_as_ties():
    """Gradients are compared without these rows. Too many of them are a problem."""
    for most, problem in ((0.1, ""), (0.05, "6.2% of its rows differ")):
        tied = dataclasses.replace(case(other_row), ties=most)
        found = parity.compare(tied, "other", jax.random.key(0))
        assert found.ties == 1 / ROWS and found.problem.startswith(problem)
        assert bool(found.problem) == bool(problem)


def test_rows_limit_the_comparison():
    """The wrong row is not among the first."""
    found = parity.compare(case(other_row), "other", jax.random.key(0), rows=1)
    assert not found.problem


def test_a_kernel(monkeypatch):
    """Interpreted; for bfloat16, whose roundings are within the bound."""
    monkeypatch.setattr(dispatch, "check_nvidia", lambda *_: None)
    kernel = partial(pallas_triton.attention, interpret=True)
    monkeypatch.setattr(pallas_triton, "attention", kernel)
    small = specs.case("small", 1, 24, 2, 1, 16, exclusive=False, dtype=specs.BFLOAT16)
    found = parity.compare(small, "pallas_triton", jax.random.key(1))
    assert not found.problem and 0 < found.differences[0].error < parity.BOUNDS["bfloat16"]
