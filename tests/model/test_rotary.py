"""Rotary positions of any width and base, and the base's NTK scaling, against complex rotation."""

import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.model.attention import apply_rotary, ntk_base, rotary_tables
from tests import oracles
from tests.model.test_techniques import TINY, TOKENS, changed, logits

X = np.random.default_rng(0).normal(size=(2, 12, 3, 8))


def turned(width, base):
    return lambda x: apply_rotary(
        x, [table[None] for table in rotary_tables(x.shape[1], width, base)]
    )


@pytest.mark.parametrize("width", [2, 4, 6, 8])
@pytest.mark.parametrize("base", [20.0, 50_000.0])
def test_equals_complex_rotation(width, base):
    oracles.check(turned(width, base), lambda x: oracles.rotary(x, width, base), X)


def test_tables_are_exact_far_out():
    """Angles of thousands of radians: an angle made in float32 would be off by 1e-4."""
    tables = rotary_tables(4096, 16, 50_000.0)
    angle = 4095 * 50_000.0 ** (-2 * np.arange(8) / 16)
    for table, want in zip(tables, (np.cos(angle), np.sin(angle)), strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table[-1], want, atol=1e-7)


def test_other_dimensions_pass_untouched():
    x = jnp.asarray(X, jnp.float32)
    got = turned(6, 100.0)(x)
    assert np.array_equal(got[..., 6:], x[..., 6:])
    assert np.all(got[:, 1:, :, :6] != x[:, 1:, :, :6])
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


def test_scores_depend_on_distance_alone():
    vectors = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16))
    queries, keys = jnp.asarray(np.repeat(vectors, 20, axis=2), jnp.float32)
    scores = np.einsum("bthd,bshd->ts", *map(turned(10, 100.0), (queries, keys)))
    for distance in range(-19, 20):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(scores[0]) > 0.1


def test_keeps_the_dtype():
    assert turned(4, 100.0)(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.bfloat16


def test_ntk_base_of_a_published_run():
    assert ntk_base(10_000.0, 16, 2048, 1024) == pytest.approx(22_082, abs=0.5)


@pytest.mark.parametrize("width", [4, 16, 64])
@pytest.mark.parametrize("length", [1025, 2048, 5000])
def test_ntk_slowest_pair_turns_as_far_as_before(width, length):
    slowest = -(width - 2) / width
    raised = ntk_base(10_000.0, width, length, 1024)
    assert length * raised**slowest == pytest.approx(1024 * 10_000.0**slowest)


@pytest.mark.parametrize(("length", "trained"), [(5, 0), (5, 5), (5, 6), (1024, 1024)])
def test_ntk_leaves_short_sequences_alone(length, trained):
    assert ntk_base(10_000.0, 16, length, trained) == 10_000.0


def test_full_width_is_the_default():
    assert np.array_equal(logits(changed(rope_dims=TINY.head_dim)), logits(TINY))


def test_ntk_of_the_model_follows_the_length_of_its_input():
    T = TOKENS.shape[1]
    assert np.array_equal(logits(changed(rope_ntk_len=T)), logits(TINY))
    shorter, short = changed(rope_ntk_len=T - 4), TOKENS[:, : T - 4]
    assert np.array_equal(logits(shorter, tokens=short), logits(TINY, tokens=short))
    raised = TINY.rope_base * (T / (T - 4)) ** (TINY.head_dim / (TINY.head_dim - 2))
    scaled = logits(shorter)
    np.testing.assert_allclose(scaled, logits(changed(rope_base=raised)), rtol=0, atol=1e-5)
    assert np.abs(scaled - logits(TINY)).max() > 1e-2
