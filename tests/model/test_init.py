"""Initial values: their spectra and distributions, and which parameter starts from which."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.model import init
from tests import oracles
from tests.model.test_techniques import STACKS, TINY, changed, initial_params

KEY = jax.random.key(3)


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


@pytest.mark.parametrize("shape", [(16, 16), (6, 40), (40, 6), (1, 5)])
@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_orthogonal_rows_or_columns(shape, gain):
    matrix = np.asarray(init.orthogonal(KEY, shape, gain), np.float64)
    assert matrix.shape == shape
    fewer = matrix if shape[0] <= shape[1] else matrix.T
    np.testing.assert_allclose(fewer @ fewer.T, gain**2 * np.eye(min(shape)), atol=1e-6)


def test_orthogonal_matrices_are_spread_over_all_rotations():
    """Haar measure: entries of mean 0 and variance 1/n."""
    many = np.stack([init.orthogonal(key, (4, 4)) for key in jax.random.split(KEY, 200)])
    assert np.abs(many.mean(0)).max() < 5 * 0.5 / math.sqrt(200)
    np.testing.assert_allclose((many**2).mean(0), 0.25, atol=0.09)


@pytest.mark.parametrize("shape", [(29, 24), (24, 29), (8, 8)])
def test_overtone_equals_the_formula(shape):
    table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = np.asarray(init.overtone(jnp.asarray(table)), np.float64)
    np.testing.assert_allclose(got, oracles.overtone(table.astype(np.float64)), atol=2e-5)


def test_phase_mix_equals_the_formula():
    for num_layers in (2, 5, 11):
        for layer in range(num_layers):
            want = np.tile(oracles.phase_mix(layer, num_layers)[:, None], (1, 3))
            np.testing.assert_allclose(init.phase_mix(layer, num_layers, 3), want, rtol=1e-6)


def test_phase_mix_of_a_published_run():
    for layer, mix in ((0, [0.182, 0.818]), (5, [0.5, 0.5]), (10, [0.818, 0.182])):
        np.testing.assert_allclose(init.phase_mix(layer, 11, 1)[:, 0], mix, atol=5e-4)


def test_phase_mix_of_a_single_layer():
    """The first layer is then the last, and its share is one of the two."""
    mix = np.asarray(init.phase_mix(0, 1, 2), np.float64)
    np.testing.assert_allclose(mix.sum(0), 1.0, rtol=1e-6)
    assert np.all((mix > 0.18) & (mix < 0.82))


# ------------------------------------------------------------------------------ of the model


def recycled(**fields):
    return initial_params(changed(**STACKS["12l_recycled"], matrix_init="orthogonal", **fields))


def test_matrices_of_an_orthogonal_model():
    params = recycled(bigram_proj_gain=0.25)
    for block in params["blocks"].values():
        attn = block["attn"]
        for matrix in (attn["query"], attn["key"], attn["value"], block["mlp"]["up"]):
            np.testing.assert_allclose(singular_values(matrix), 1.0, rtol=1e-5)
    np.testing.assert_allclose(singular_values(params["bigram"]["proj"]), 0.25, rtol=1e-5)
    np.testing.assert_allclose(singular_values(params["value_embed"]["proj"]), 1.0, rtol=1e-5)


@pytest.mark.parametrize("matrix_init", ["fan_in_uniform", "orthogonal"])
def test_output_matrices_start_at_zero(matrix_init):
    for block in initial_params(changed(matrix_init=matrix_init))["blocks"].values():
        assert not np.any(block["attn"]["out"]) and not np.any(block["mlp"]["down"])
        assert np.any(block["attn"]["query"]) and np.any(block["mlp"]["up"])


def test_matrices_of_a_uniform_model():
    block = initial_params(changed(d_model=96, mlp_dim=128))["blocks"][0]
    for matrix in (block["attn"]["query"], block["mlp"]["up"]):
        bound = 96**-0.5
        assert 0.95 * bound < np.abs(matrix).max() <= bound
        assert np.std(matrix) == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_no_two_matrices_start_alike():
    matrices = [np.asarray(leaf) for leaf in jax.tree.leaves(recycled()) if leaf.ndim == 2]
    found = [matrix.tobytes() for matrix in matrices if np.std(matrix, axis=1).any()]
    assert len(set(found)) == len(found) == 4 * 4 + 4


def test_scales_and_tables():
    wide = {**STACKS["12l_recycled"], "value_embed_dim": 400, "bigram_dim": 400}
    params = initial_params(changed(**wide, bigram_scale_init=0.07))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {path_name(path): leaf for path, leaf in leaves}
    constant = {
        "blocks/2/attn/q_gain": ((4,), 1.5),
        "blocks/2/attn/gate_weight": ((24, 4), 0.0),
        "blocks/2/attn/gate_bias": ((4,), 4.0),
        "blocks/2/attn/value_mix": ((2,), 0.5),
        "blocks/2/attn_scale": ((24,), 1.0),
        "blocks/2/mlp_scale": ((24,), 1.0),
        "skip_weights": ((2, 24), 1.0),
        "smear/gate": ((24,), 0.0),
        "bigram/table": ((13, 400), 0.0),
        "bigram/scale": ((), 0.07),
        "value_embed/scale": ((), 0.1),
        "value_embed/layer_scale": ((2,), 1.0),
        "recycle/scale": ((2, 24), 1.0),
        "recycle/bias": ((2, 24), 0.0),
    }
    for name, (shape, value) in constant.items():
        assert found[name].shape == shape and found[name].dtype == jnp.float32, name
        np.testing.assert_array_equal(found[name], np.float32(value), err_msg=name)
    assert all(f"blocks/{layer}/attn/value_mix" in found for layer in range(4))
    table = params["value_embed"]["table"]
    assert np.std(table) == pytest.approx(0.01, rel=0.03) and abs(np.mean(table)) < 4e-4


def test_a_bigram_table_may_start_at_random():
    params = initial_params(changed(bigram_buckets=200, bigram_dim=100, bigram_init_std=1.0))
    assert np.std(params["bigram"]["table"]) == pytest.approx(1.0, rel=0.02)


def test_embedding_has_the_stated_spread_or_spectrum():
    fields = {"vocab_size": 400, "embed_init_std": 0.02}
    plain = initial_params(changed(**fields))["embed"]["table"]
    assert np.std(plain) == pytest.approx(0.02, rel=0.03)
    overtone = initial_params(changed(**fields, embed_init="overtone"))["embed"]["table"]
    np.testing.assert_allclose(overtone, oracles.overtone(np.asarray(plain, np.float64)), atol=1e-6)


def test_residual_mixing_starts_as_the_identity_or_by_phase():
    for block in initial_params(TINY)["blocks"].values():
        np.testing.assert_array_equal(block["resid_mix"], np.repeat([[1.0], [0.0]], 24, axis=1))
    for layer, block in initial_params(changed(resid_mix_init="phase"))["blocks"].items():
        want = np.repeat(oracles.phase_mix(layer, 4)[:, None], 24, axis=1)
        np.testing.assert_allclose(block["resid_mix"], want, rtol=1e-6)
