"""GPTQ against the paper's column-by-column elimination, and against every choice of codes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.artifact.gptq import gptq
from sngpt_jax.artifact.quantize import nearest_codes
from sngpt_jax.base.errors import UserError

RANGES = st.sampled_from([(-16, 15), (-15, 15), (-32, 31), (-31, 31), (-128, 127), (-1, 1)])


def case(seed, rows, columns, correlation=0.7):
    """Weights, and the second moments of correlated inputs of different sizes."""
    rng, tokens = np.random.default_rng(seed), 4 * columns
    weights = np.float32(rng.normal(size=(rows, columns)))
    common = correlation * rng.normal(size=(tokens, 1))
    inputs = rng.normal(size=(tokens, columns)) + common
    inputs *= 2.0 ** rng.uniform(-2, 2, size=columns)
    return weights, inputs.T @ inputs


def scales_of(weights, q_max):
    return np.float16(np.abs(weights).max(1) / q_max)


def gptq_codes(weights, scales, second_moment, q=(-15, 15), damping=0.01, block=8):
    return gptq(
        weights, scales, second_moment, q_min=q[0], q_max=q[1], damping=damping, block=block
    )


def paper(weights, scales, second_moment, q_min, q_max, damping):
    """The paper's algorithm, float64: after each column the inverse of H loses it."""
    weights, steps = np.float64(weights), np.float64(scales)
    h = second_moment + damping * np.mean(np.diag(second_moment)) * np.eye(len(second_moment))
    inverse, codes = np.linalg.inv(h), np.zeros(weights.shape)
    for i in np.argsort(-np.diag(second_moment), kind="stable"):
        codes[:, i] = np.clip(np.rint(weights[:, i] / steps), q_min, q_max)
        error = (weights[:, i] - codes[:, i] * steps) / inverse[i, i]
        weights = weights - np.outer(error, inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def objective(weights, scales, codes, second_moment):
    """The squared error of each row's outputs."""
    error = np.float64(weights) - np.float64(scales)[:, None] * codes
    return np.einsum("ri,ij,rj->r", error, second_moment, error)


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    columns=st.integers(1, 24),
    q=RANGES,
    damping=st.sampled_from([0.001, 0.01, 0.3]),
    block=st.integers(1, 30),
)
def test_is_the_algorithm_of_the_paper(seed, rows, columns, q, damping, block):
    weights, second_moment = case(seed, rows, columns)
    scales = scales_of(weights, q[1])
    codes = gptq_codes(weights, scales, second_moment, q, damping, block)
    assert codes.dtype == np.int8 and codes.flags.c_contiguous
    np.testing.assert_array_equal(codes, paper(weights, scales, second_moment, *q, damping))


@given(seed=st.integers(0, 10_000), q=RANGES)
def test_inputs_that_know_nothing_of_each_other_leave_the_nearest_codes(seed, q):
    rng = np.random.default_rng(seed)
    weights = np.float32(rng.normal(size=(5, 40)))
    scales = scales_of(weights, q[1])
    ties = np.float32(scales)[:, None] * np.float32(rng.integers(*q, size=(5, 20)) + 0.5)
    sides = rng.choice(np.float32([-np.inf, 0, np.inf]), size=ties.shape)
    weights[:, 20:] = np.nextafter(ties, sides)
    codes = gptq_codes(weights, scales, np.diag(rng.uniform(0.1, 10, size=40)), q, block=7)
    np.testing.assert_array_equal(codes, nearest_codes(weights, scales, *q))


def test_mostly_as_good_as_the_best_codes_and_never_better():
    """Against all 7^4 choices of a row's four codes."""
    choices = np.array(list(itertools.product(range(-3, 4), repeat=4)))
    found, nearest, least = np.zeros((3, 60))
    for seed in range(60):
        weights, second_moment = case(seed, 1, 4, correlation=2.0)
        scales = scales_of(weights, 3)
        repeated = np.repeat(weights, len(choices), 0), np.repeat(scales, len(choices))
        least[seed] = objective(*repeated, choices, second_moment).min()
        codes = gptq_codes(weights, scales, second_moment, (-3, 3), 0.0, block=4)
        found[seed] = objective(weights, scales, codes, second_moment)[0]
        codes = nearest_codes(weights, scales, -3, 3)
        nearest[seed] = objective(weights, scales, codes, second_moment)[0]
    assert (found >= least * (1 - 1e-9)).all()
    assert np.isclose(found, least).mean() > 0.75 > 0.5 > np.isclose(nearest, least).mean()
    assert found.sum() < 1.1 * least.sum() < 0.5 * nearest.sum()


def test_inputs_that_are_always_equal_share_one_sum():
    """Only the sum of the weights matters then: ten halves make five ones, and rounding to nearest
    makes none.
    """
    weights, scales = np.full((1, 10), 0.5, np.float32), np.ones(1, np.float16)
    codes = gptq_codes(weights, scales, np.ones((10, 10)), (-3, 3), 1e-4, block=3)
    assert codes.sum() == 5 and nearest_codes(weights, scales, -3, 3).sum() == 0


def test_the_block_the_unit_of_the_inputs_and_the_memory_order_change_nothing():
    weights, second_moment = case(1, 48, 200)
    scales, before = scales_of(weights, 15), (weights.copy(), second_moment.copy())
    expected = gptq_codes(weights, scales, second_moment, (-16, 15), block=1)
    for block, unit in [(2, 1.0), (32, 2.0**-40), (128, 2.0**20), (200, 1.0), (1000, 1.0)]:
        codes = gptq_codes(weights, scales, second_moment * unit, (-16, 15), block=block)
        np.testing.assert_array_equal(codes, expected)
    codes = gptq_codes(np.asfortranarray(weights), scales, second_moment, (-16, 15))
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(weights, before[0])
    np.testing.assert_array_equal(second_moment, before[1])


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_were_always_zero_keep_their_nearest_codes(damping):
    weights, second_moment = case(3, 10, 30)
    scales = scales_of(weights, 15)
    nearest = nearest_codes(weights, scales, -15, 15)
    alive = np.arange(30) % 3 != 0
    second_moment[~alive] = second_moment[:, ~alive] = 0
    codes = gptq_codes(weights, scales, second_moment, damping=damping)
    np.testing.assert_array_equal(codes[:, ~alive], nearest[:, ~alive])
    # damping is a share of the mean of the diagonal, which counts all 30
    damping *= alive.mean()
    moment = second_moment[np.ix_(alive, alive)]
    expected = gptq_codes(weights[:, alive], scales, moment, damping=damping)
    np.testing.assert_array_equal(codes[:, alive], expected)
    none = gptq_codes(weights, scales, np.zeros((30, 30)), damping=damping)
    np.testing.assert_array_equal(none, nearest)


def test_what_cannot_calibrate_is_one_error():
    weights, second_moment = case(4, 3, 5)
    second_moment[1, 2] = np.nan
    scales = scales_of(weights, 15)
    with pytest.raises(UserError, match="not finite"):
        gptq_codes(weights, scales, second_moment)
    with pytest.raises(UserError, match=r"singular; raise export\.gptq_damping"):
        gptq_codes(weights, scales, np.ones((5, 5)), damping=0.0)
