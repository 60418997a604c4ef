"""A layer's attention against a float64 numpy oracle, rotary positions against complex rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.attention import Attention, apply_rotary, make_positions, rotary_tables
from tests import oracles


@pytest.mark.parametrize("base", [100.0, 10_000.0])
def test_rotary_equals_complex_rotation(base):
    x = np.random.default_rng(0).normal(size=(2, 12, 3, 8))
    got = apply_rotary(
        jnp.asarray(x, jnp.float32), [table[None] for table in rotary_tables(12, 8, base)]
    )
    np.testing.assert_allclose(got, oracles.rotary(x, 8, base), atol=2e-6)


def test_rotary_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (np.tile(rng.normal(size=(1, 1, 1, 16)), (1, 20, 1, 1)) for _ in range(2))
    tables = [table[None] for table in rotary_tables(20, 16, 10_000.0)]
    q, k = (np.asarray(apply_rotary(jnp.asarray(a, jnp.float32), tables))[0, :, 0] for a in (q, k))
    scores = q @ k.T
    for distance in range(-5, 6):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)


def test_whole_layer_equals_the_oracle():
    config = ModelConfig(d_model=24, num_heads=4, num_kv_heads=2, compute_dtype="float32")
    layer = Attention(config, 0, rngs=nnx.Rngs(params=jax.random.key(0)))
    rng = np.random.default_rng(0)
    layer.out[...] = jnp.asarray(rng.normal(size=(24, 24)), jnp.float32)
    layer.q_gain[...] = jnp.asarray([0.5, 1.0, 1.5, 2.0])
    x = rng.normal(size=(2, 7, 24))
    wq, wk, wv, wo = (
        np.asarray(w[...], np.float64) for w in (layer.query, layer.key, layer.value, layer.out)
    )

    def normed(a):
        return a / np.sqrt(np.mean(a**2, -1, keepdims=True) + config.norm_eps)

    q = (
        oracles.rotary(normed((x @ wq).reshape(2, 7, 4, 6)), 6, 1e4)
        * np.array([0.5, 1.0, 1.5, 2.0])[:, None]
    )
    k = oracles.rotary(normed((x @ wk).reshape(2, 7, 2, 6)), 6, 1e4)
    want = oracles.attend(q, k, (x @ wv).reshape(2, 7, 2, 6)).reshape(2, 7, 24) @ wo
    got, value = layer(jnp.asarray(x, jnp.float32), make_positions(config, 7))
    np.testing.assert_allclose(got, want, atol=3e-5)
    np.testing.assert_allclose(value, (x @ wv).reshape(2, 7, 2, 6), atol=3e-5)


def test_output_projection_starts_silent():
    config = ModelConfig(d_model=16, num_heads=2, num_kv_heads=1)
    layer = Attention(config, 0, rngs=nnx.Rngs(params=jax.random.key(0)))
    assert not np.any(layer(jnp.ones((1, 3, 16)), make_positions(config, 3))[0])
