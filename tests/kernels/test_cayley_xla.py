"""The implementation in plain jax: its memory, its selection on a CPU, and its helpers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sngpt_kernels.cayley import dictionary, reference, xla
from sngpt_kernels.cayley.api import encode_decode

from tests.kernels.cayley_checks import (
    EPS,
    SHALLOW,
    check_selection,
    compiled,
    make_inputs,
    reference_code,
    value_and_gradients,
)


@st.composite
def any_levels(draw):
    t = draw(st.integers(3, 6))
    generators = draw(st.sampled_from(["spread", "prefix"]))
    levels = [(t, draw(st.integers(1, 2**t)), 0)]
    while len(levels) < 3 and levels[-1][0] < 2 * t and draw(st.booleans()):
        below = levels[-1][0]
        n = draw(st.integers(below + 1, min(2 * t, below + 3)))
        degree = 2 ** draw(st.integers(n - below, min(below, n - below + 3)))
        try:
            dictionary.check_levels((*levels, (n, 1, degree)), 2**t, generators)
        except ValueError:  # dependent generators
            assume(False)
        table = dictionary.children((*levels, (n, 1, degree)), generators, len(levels))
        fewest = table.fewest_candidates(levels[-1][1])
        levels.append((n, draw(st.sampled_from([1, fewest // 2 or 1, fewest])), degree))
    return tuple(levels), generators


@settings(max_examples=5)  # each compiles a program
@given(any_levels(), st.integers(1, 9), st.sampled_from(["random", "tied"]))
def test_any_levels_match_reference(levels, tokens, kind):
    inputs = make_inputs(kind, levels[0], tokens)
    code = reference_code(dictionary.Scheme(levels[0], generators=levels[1]), inputs)
    arrays = [inputs[name] for name in ("x", "mean", "std", "bias")]
    x_hat, ids = jax.jit(lambda *a: encode_decode(*a, levels[0], generators=levels[1]))(*arrays)
    equal, _ = check_selection(ids, code, inputs, levels[0])
    tolerance = 20 * EPS * np.abs(code.x_hat).max()
    np.testing.assert_allclose(x_hat[equal], code.x_hat[equal], atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 37])
def test_chunking_changes_nothing(tokens, monkeypatch):
    inputs, scheme = make_inputs("random", SHALLOW, tokens), dictionary.Scheme(SHALLOW)
    whole = value_and_gradients("xla", scheme, inputs)
    monkeypatch.setattr(xla, "CPU_CHUNK_BYTES", 5 * 4 * 12 * 64)
    chunked = compiled.__wrapped__("xla", scheme)(*inputs.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunked, whole)


def arrays_of(jaxpr):
    """The abstract values of all intermediates, those of inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found += [v.aval for v in equation.outvars]
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            found += arrays_of(inner) if hasattr(inner, "eqns") else []
    return found


def test_never_scores_all_features_of_all_tokens():
    levels, tokens = ((6, 4, 0), (9, 8, 32), (12, 12, 16)), 640
    inputs = make_inputs("random", levels, tokens)
    run = functools.partial(value_and_gradients, "xla", dictionary.Scheme(levels))
    arrays = arrays_of(jax.make_jaxpr(run)(inputs).jaxpr)
    candidates = max(4 * 28, 8 * 14)
    assert len(arrays) > 200 and any(a.size == tokens * 24 for a in arrays)
    # the signs of the atoms; 4096 features would be more
    assert max(a.size for a in arrays) <= tokens * max(24 * 64, candidates)


def test_a_cpu_selects_by_its_own_top_k():
    """If the compiler does not recognize a top_k, it sorts, which is ten times slower overall."""
    arrays = list(make_inputs("random", SHALLOW, 37).values())[:4]
    run = jax.jit(functools.partial(encode_decode, levels=SHALLOW))
    program = run.lower(*arrays).compile().as_text()
    assert program.count('custom_call_target="TopK"') >= len(SHALLOW)
    assert "f32[37,112]{1,0}, s32[37,112]{1,0}) sort(" not in program


def test_helpers_against_reference():
    rng = np.random.default_rng(3)
    x, ids = rng.standard_normal((2, 3, 64)).astype(np.float32), rng.integers(0, 2048, (2, 3, 5))
    everything = np.array([reference.scores(row, np.arange(2048)) for row in x.reshape(6, 64)])
    scores = jax.jit(xla.all_scores, static_argnums=1)(x, 11)
    np.testing.assert_allclose(scores, everything.reshape(2, 3, 2048), atol=1e-5)
    squares = jax.jit(xla.sum_squared_scores, static_argnums=1)(x, 11)
    expected = (everything.reshape(2, 3, 2048) ** 2).sum(1)
    np.testing.assert_allclose(squares, expected, rtol=1e-5, atol=1e-6)
    expected = np.take_along_axis(everything.reshape(2, 3, 2048), ids, axis=-1)
    np.testing.assert_allclose(jax.jit(xla.scores_at)(x, ids), expected, atol=1e-5)
    coefficients = rng.standard_normal((2, 3, 5)).astype(np.float32)
    expected = np.einsum("...a,...ad->...d", coefficients, dictionary.atoms(ids, 64))
    sums = jax.jit(xla.combine, static_argnums=2)(coefficients, ids, 64)
    np.testing.assert_allclose(sums, expected, atol=1e-5)


def test_running_statistics_from_the_helpers_are_the_references():
    """Var⟨x, v⟩ = mean ⟨x - mean x, v⟩²."""
    rng = np.random.default_rng(4)
    sample, mean = rng.standard_normal((50, 16)) + 2, rng.standard_normal(16)
    std = rng.uniform(0.5, 2, 256)
    centre = sample.mean(0)
    variance = xla.sum_squared_scores(jnp.asarray(sample - centre, jnp.float32), 8) / 50
    expected_mean, expected_std = reference.update_statistics(mean, std, sample)
    np.testing.assert_allclose(0.99 * mean + 0.01 * centre, expected_mean, rtol=1e-12)
    np.testing.assert_allclose(0.99 * std + 0.01 * np.sqrt(variance), expected_std, rtol=1e-6)
