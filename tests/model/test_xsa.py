"""Exclusive self-attention: its formula, its geometry, the layers that use it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.model.attention import Attention, exclude_own_value, make_positions
from tests import oracles
from tests.model.test_techniques import TINY, changed, logits, random_params


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
    np.testing.assert_allclose(got + inside, y, rtol=0, atol=1e-6 * np.abs(y).max())  # nothing else is taken away


def test_is_a_projection_that_knows_only_the_direction_of_v():
    y, v = float32(*draw(np.random.default_rng(1), 5, 2, 2, 8))
    once = exclude_own_value(y, v)
    for again in (exclude_own_value(once, v), exclude_own_value(y, -3.0 * v)):
        np.testing.assert_allclose(again, once, rtol=0, atol=1e-6)


def test_nothing_happens_to_what_is_orthogonal_already():
    """Integers, so that the products are exact."""
    y = jnp.asarray([[[[2.0, -1.0, 5.0, 0.0], [0.0, 0.0, 3.0, -4.0]]]])
    v = jnp.asarray([[[[1.0, 2.0, 0.0, 0.0]]]])
    assert np.array_equal(exclude_own_value(y, v), y)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1e-11, 1e-9])
def test_value_and_gradient_are_finite_at_and_near_a_value_of_zero(scale):
    y, v = float32(*draw(np.random.default_rng(2), 3, 2, 2, 4))
    v = v.at[:, 1].multiply(scale)
    got, grads = jax.value_and_grad(lambda y, v: jnp.sum(jnp.sin(exclude_own_value(y, v))), argnums=(0, 1))(y, v)
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


def test_the_last_layers_use_it():
    """A layer's own output changes exactly where the layer is one of the last `xsa_layers`."""
    rng = np.random.default_rng(4)
    (x,) = float32(rng.normal(size=(2, 8, TINY.d_model)))

    @functools.cache
    def output(layer, xsa_layers):
        config = changed(xsa_layers=xsa_layers)
        attention = Attention(config, layer, rngs=nnx.Rngs(params=jax.random.key(layer)))
        attention.out[...] = jnp.eye(TINY.d_model)
        return np.asarray(attention(x, make_positions(config, 8))[0])

    for xsa_layers in (1, 3):
        differs = [not np.array_equal(output(layer, xsa_layers), output(layer, 0)) for layer in range(4)]
        assert differs == [layer >= 4 - xsa_layers for layer in range(4)]


@pytest.mark.parametrize("xsa_layers", [1, 2, 3, 4])
def test_earlier_layers_of_the_model_are_unaffected(xsa_layers):
    """With the outputs of the last layers silenced nothing of XSA is left; with that of the first of them not, it shows."""
    params = random_params(TINY)
    first = TINY.num_layers - xsa_layers
    exclusive = changed(xsa_layers=xsa_layers)

    def with_silent(layers):
        blocks = {i: {**b, "attn_scale": 0.0 * b["attn_scale"]} if i in layers else b for i, b in params["blocks"].items()}
        return {**params, "blocks": blocks}

    silent = with_silent(range(first, TINY.num_layers))
    assert np.array_equal(logits(exclusive, silent), logits(TINY, silent))
    heard = with_silent(range(first + 1, TINY.num_layers))
    assert np.abs(logits(exclusive, heard) - logits(TINY, heard)).max() > 1e-3
