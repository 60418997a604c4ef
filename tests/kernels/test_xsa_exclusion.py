"""The exclusion of a position's own value (XSA): its formula and its geometry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sngpt_kernels.epilogue.xla import exclude_own_value

from tests import oracles


def draw(rng, T, K, group, h):
    return rng.normal(size=(2, T, K * group, h)), rng.normal(size=(2, T, K, h))


def float32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize(("K", "group"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 2)])
def test_equals_the_formula(K, group):
    y, v = draw(np.random.default_rng(0), 5, K, group, 6)
    oracles.check(exclude_own_value, oracles.exclude_own_value, y, v)


@settings(max_examples=10, deadline=None)  # each shape compiles anew
@given(
    T=st.integers(1, 4),
    K=st.integers(1, 3),
    group=st.integers(1, 4),
    h=st.integers(1, 9),
    log_scale=st.integers(-6, 6),
    seed=st.integers(0, 2**31 - 1),
)
def test_result_is_orthogonal_to_the_groups_value(T, K, group, h, log_scale, seed):
    y, v = draw(np.random.default_rng(seed), T, K, group, h)
    y, v = float32(y, v * 10.0**log_scale)
    got = np.asarray(jax.jit(exclude_own_value)(y, v), np.float64)
    unit = np.repeat(np.asarray(v, np.float64), group, axis=2)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    assert np.all(np.abs(np.sum(got * unit, -1)) <= 1e-6 * np.linalg.norm(y, axis=-1))
    inside = np.sum(np.asarray(y, np.float64) * unit, -1, keepdims=True) * unit
    # nothing else is taken away
    np.testing.assert_allclose(got + inside, y, rtol=0, atol=1e-6 * np.abs(y).max())


def test_is_a_projection_that_knows_only_the_direction_of_v():
    y, v = float32(*draw(np.random.default_rng(1), 5, 2, 2, 8))
    once = exclude_own_value(y, v)
    for again in (exclude_own_value(once, v), exclude_own_value(y, -3.0 * v)):
        np.testing.assert_allclose(again, once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1e-11, 1e-9])
def test_value_and_gradient_are_finite_at_and_near_a_value_of_zero(scale):
    y, v = float32(*draw(np.random.default_rng(2), 3, 2, 2, 4))
    v = v.at[:, 1].multiply(scale)
    got, grads = jax.value_and_grad(
        lambda y, v: jnp.sum(jnp.sin(exclude_own_value(y, v))), argnums=(0, 1)
    )(y, v)
    assert np.isfinite(got)
    assert all(np.all(np.isfinite(g)) for g in grads)
    if scale == 0.0:
        assert np.array_equal(exclude_own_value(y, v)[:, 1], y[:, 1])
        np.testing.assert_allclose(grads[0][:, 1], jnp.cos(y[:, 1]), rtol=1e-6)


def test_bfloat16_projects_in_float32():
    y, v = (a.astype(jnp.bfloat16) for a in float32(*draw(np.random.default_rng(3), 5, 2, 2, 64)))
    got = exclude_own_value(y, v)
    assert got.dtype == jnp.bfloat16
    want = exclude_own_value(y.astype(jnp.float32), v.astype(jnp.float32))
    assert np.array_equal(got, want.astype(jnp.bfloat16))
