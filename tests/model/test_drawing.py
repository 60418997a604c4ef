"""Draws of a token against the distribution in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sngpt_jax.model.drawing import draw, filtered


def distribution(logits, temperature, top_k, top_p):
    """The probabilities of all tokens, float64 [V], by sorting and adding one after the other."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = {i: np.exp((logits[i] - max(logits)) / temperature) for i in order}
    total, kept, below = sum(weights.values()), [], 0.0
    for i in order:
        if below >= top_p:
            break
        kept.append(i)
        below += weights[i] / total
    found = np.zeros(len(logits))
    found[kept] = [weights[i] for i in kept]
    return found / found.sum()


# logarithms of whole numbers, so that many are equal and sums of probabilities are fractions
whole_numbers = st.lists(st.integers(1, 6), min_size=8, max_size=8)


@given(whole_numbers, st.sampled_from([0.5, 1.0]), st.integers(0, 9), st.integers(1, 20))
def test_the_kept_tokens_have_the_probabilities_of_the_definition(numbers, t, top_k, twentieths):
    # no sum of probabilities is this close to a border, so rounding decides nothing
    top_p = twentieths / 20 - 1e-4 if twentieths < 20 else 1.0
    logits = np.log(np.array(numbers, np.float64))
    kept = filtered(jnp.float32(logits), jnp.float32(t), top_k=top_k, top_p=top_p)
    want = distribution(logits.tolist(), t, top_k, top_p)
    got = np.asarray(jax.nn.softmax(kept))
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.7), (3, 0.9)])
def test_frequencies_follow_the_distribution(temperature, top_k, top_p):
    """By a chi-square test. Token 3 ties with token 2, and only one of them is among two; rows 5
    and 6 of the table are no tokens.
    """
    logits = [0.0, 1.0, 2.0, 2.0, -1.0]
    table = jnp.asarray([*logits, 9.0, 9.0])
    count = 4000
    options = {"top_k": top_k, "top_p": top_p, "vocab_size": 5}
    key = jax.random.key(0)
    at = jnp.arange(count)
    tokens = jax.vmap(lambda i: draw(table, key, i, jnp.float32(temperature), **options))(at)
    want = distribution(logits, temperature, top_k, top_p)
    got = np.bincount(np.asarray(tokens), minlength=7)
    drawn = want > 0
    assert got[:5][~drawn].sum() == got[5:].sum() == 0
    assert stats.chisquare(got[:5][drawn], count * want[drawn]).pvalue > 1e-3


def test_temperature_0_takes_the_likeliest_and_of_equals_the_first():
    table = jnp.asarray([0.0, 2.0, 2.0, 1.0, 9.0])
    for top_k, top_p in [(0, 1.0), (3, 0.5)]:
        options = {"top_k": top_k, "top_p": top_p, "vocab_size": 4}
        assert draw(table, jax.random.key(1), jnp.int32(0), jnp.float32(0), **options) == 1
