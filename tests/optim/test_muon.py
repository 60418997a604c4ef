"""Muon against singular value decompositions in float64, and against optax."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib

from sngpt_jax.optim import muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(64, 64), (96, 32), (32, 96)]  # square, tall, wide


def conditioned(shape, seed=0, smallest=0.05):
    """A float32 matrix with singular values from 1 to `smallest`, and its U Vᵀ in float64."""
    rng = np.random.default_rng(seed)
    rank = min(shape)
    u = np.linalg.qr(rng.normal(size=(shape[0], rank)))[0]
    v = np.linalg.qr(rng.normal(size=(shape[1], rank)))[0]
    return np.float32(u * np.linspace(1.0, smallest, rank) @ v.T), u @ v.T


def iterated(s, polynomials):
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return s


def on_singular_values(matrix, polynomials):
    """What the iteration computes, by algebra: the polynomials of each singular value."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u * iterated(s / (np.linalg.norm(s) + 1e-7), polynomials) @ vt


def quintic_on_singular_values(matrix, steps):
    return on_singular_values(matrix, [COEFFICIENTS] * steps)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orthogonalizes(shape, dtype):
    matrix, polar = conditioned(shape)
    result = np.asarray(muon.newton_schulz(jnp.asarray(matrix), 5, dtype))
    assert result.shape == shape and result.dtype == np.float32
    singular = np.linalg.svd(result, compute_uv=False)
    assert 0.63 < singular.min() and singular.max() < 1.23
    assert np.vdot(result, polar) > 0.98 * np.linalg.norm(result) * np.linalg.norm(polar)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_is_the_published_polynomial_of_the_singular_values(shape, steps):
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    result = muon.newton_schulz(jnp.asarray(matrix), steps, jnp.float32)
    np.testing.assert_allclose(result, quintic_on_singular_values(matrix, steps), atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_optax(shape):
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
    oracle = contrib.scale_by_muon(
        ns_coeffs=COEFFICIENTS, ns_steps=5, beta=0.0, eps=1e-7, nesterov=False
    )
    expected, _ = oracle.update(matrix, oracle.init(matrix))
    np.testing.assert_allclose(muon.newton_schulz(matrix, 5, jnp.float32), expected, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_stays_near_float32(shape):
    matrix = jnp.asarray(conditioned(shape)[0])
    exact = muon.newton_schulz(matrix, 5, jnp.float32)
    rounded = muon.newton_schulz(matrix, 5, jnp.bfloat16)
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    # only the products are in bfloat16: coefficients rounded to it would leave 0.04
    assert 1e-4 < error < 0.025


@settings(max_examples=20)
@given(exponent=st.integers(-4, 6), seed=st.integers(0, 99))
def test_scale_of_the_gradient_does_not_matter(exponent, seed):
    matrix = conditioned((24, 16), seed)[0]
    result, expected = (
        muon.newton_schulz(jnp.asarray(x, jnp.float32), 5, jnp.float32)
        for x in (matrix * 10.0**exponent, matrix)
    )
    np.testing.assert_allclose(result, expected, atol=2e-3)


def test_leading_axes_are_a_stack_and_zero_stays_zero():
    stack = np.zeros((2, 3, 8, 12), np.float32)
    stack[1, 2] = conditioned((8, 12))[0]
    result = np.array(muon.newton_schulz(jnp.asarray(stack), 5, jnp.float32))
    alone = muon.newton_schulz(jnp.asarray(stack[1, 2]), 5, jnp.float32)
    np.testing.assert_allclose(result[1, 2], alone, atol=1e-5)
    result[1, 2] = 0
    assert not result.any()


# ------------------------------------------------------------------------------ Polar Express


def test_polar_express_is_the_best_quintic_of_each_interval():
    """Chebyshev: the best odd quintic swings four times as far to both sides of the constant.

    The first interval is [0.001, 1], each further one the range of the polynomials before. As in
    the paper, its lower end is taken no lower than 0.0241 of the upper one, and the quintic is
    scaled so that the range over the whole interval has its middle at 1.
    """
    low, high, safety = 1e-3, 1.0, 1.01
    polynomials = muon.polynomials("polar_express", 9)
    for a, b, c in polynomials[:6]:
        a, b, c = a * safety, b * safety**3, c * safety**5
        turns = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a])))
        swings = iterated(np.array([max(low, 0.0240732743 * high), *turns, high]), [(a, b, c)])
        swings -= swings.mean()
        np.testing.assert_allclose(swings, swings[-1] * np.array([-1, 1, -1, 1]), rtol=1e-4)
        reached = iterated(np.linspace(low, high, 100_001), [(a, b, c)])
        low, high = reached.min(), reached.max()
        assert low + high == pytest.approx(2, abs=1e-6)
    assert polynomials[7] == polynomials[8] == (1.875, -1.25, 0.375)
    assert muon.polynomials("quintic", 3) == [COEFFICIENTS] * 3


@pytest.mark.parametrize(
    ("steps", "low", "high"),
    [(3, 0.13, 1.87), (5, 0.84, 1.13), (6, 0.99, 1.01), (8, 0.9999, 1.0001)],
)
def test_range_of_polar_express(steps, low, high):
    polynomials = muon.polynomials("polar_express", steps)
    reached = iterated(np.geomspace(1e-3, 1.0, 100_001), polynomials)
    assert low < reached.min() and reached.max() < high
    matrix, polar = conditioned((96, 32), smallest=0.01)  # 0.0025 of the norm
    result = muon.newton_schulz(jnp.asarray(matrix), steps, jnp.float32, "polar_express")
    np.testing.assert_allclose(result, on_singular_values(matrix, polynomials), atol=5e-5)
    if steps >= 5:
        quintic = muon.newton_schulz(jnp.asarray(matrix), steps, jnp.float32)
        assert np.linalg.norm(result - polar) < 0.6 * np.linalg.norm(quintic - polar)


def test_polar_express_in_bfloat16_stays_bounded():
    matrix = jnp.asarray(conditioned((64, 96), smallest=0.01)[0])
    for steps in (5, 7, 12):
        result = muon.newton_schulz(matrix, steps, jnp.bfloat16, "polar_express")
        singular = np.linalg.svd(result, compute_uv=False)
        assert 0.8 < singular.min() and singular.max() < 1.2


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float32, "f32")])
def test_every_product_is_a_batched_one_in_the_dtype(dtype, name):
    program = jax.jit(lambda x: muon.newton_schulz(x, 2, dtype)).lower(jnp.zeros((3, 8, 6)))
    lines = [line for line in program.as_text().splitlines() if "dot_general" in line]
    assert len(lines) == 2 * 3
    for line in lines:
        assert re.findall(r"tensor<(\d+)x\d+x\d+x(\w+)>", line) == [("3", name)] * 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(2, 128, 128), (3, 192, 96), (1, 64, 256)])
def test_flops_are_the_compilers(shape, dtype):
    program = jax.jit(lambda x: muon.newton_schulz(x, 5, dtype)).lower(jnp.zeros(shape)).compile()
    counted = program.cost_analysis()["flops"]
    assert counted == pytest.approx(muon.newton_schulz_flops(shape, 5), rel=0.05)


# ------------------------------------------------------------------------------ the transformation

TREE_SHAPES = {"a": (16, 24), "b": {"c": (24, 16), "d": (16, 24)}, "e": (16, 16), "f": (16, 24)}


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        TREE_SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_three_updates_follow_the_formula():
    def rising(count):
        return 0.5 + 0.1 * count

    transformation = muon.scale_by_muon(rising, ns_steps=5, ns_dtype=jnp.float32)
    update = jax.jit(transformation.update)
    state = transformation.init(random_tree(0))
    buffers = [0.0] * len(jax.tree.leaves(random_tree(0)))
    for count in range(3):
        updates, state = update(random_tree(10 + count), state)
        mu = rising(count)
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(random_tree(10 + count))]
        buffers = [mu * m + g for m, g in zip(buffers, grads, strict=True)]
        leaves = map(jax.tree.leaves, (updates, state.momentum))
        for actual, kept, g, m in zip(*leaves, grads, buffers, strict=True):
            fan_in, fan_out = g.shape
            expected = quintic_on_singular_values(g + mu * m, 5)
            expected *= np.sqrt(max(1, fan_out / fan_in))
            np.testing.assert_allclose(actual, expected, atol=1e-4)
            np.testing.assert_allclose(kept, m, rtol=1e-5, atol=1e-6)
        assert int(state.count) == count + 1 and state.count.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stacked_equals_matrix_by_matrix(dtype):
    transformation = muon.scale_by_muon(0.9, ns_steps=2, ns_dtype=dtype)
    params, grads = random_tree(0), random_tree(1)
    together, _ = jax.jit(transformation.update)(grads, transformation.init(params))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03
    for name in ("a", "f", "e"):
        one = {name: grads[name]}
        alone, _ = jax.jit(transformation.update)(one, transformation.init(one))
        np.testing.assert_allclose(together[name], alone[name], atol=tolerance)


def test_one_stack_for_each_shape():
    transformation = muon.scale_by_muon(0.9, ns_steps=5)
    params = random_tree(0)
    text = str(jax.make_jaxpr(transformation.update)(params, transformation.init(params)))
    # products, steps, shapes: four matrices share a stack, one of them transposed
    assert text.count("dot_general") == 3 * 5 * 2


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_only_matrices(shape):
    params = {"blocks": {3: {"gain": jnp.zeros(shape), "up": jnp.zeros((2, 2))}}}
    with pytest.raises(ValueError, match=r"blocks/3/gain.*shape"):
        muon.scale_by_muon(0.9).init(params)


def test_momentum_is_float32_for_any_gradient():
    transformation = muon.scale_by_muon(0.9)
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    updates, state = transformation.update(params, transformation.init(params))
    assert updates["w"].dtype == state.momentum["w"].dtype == jnp.float32


def test_bfloat16_momentum_is_rounded_only_where_it_is_kept():
    """Each update from the momentum kept before it, in float64."""
    transformation = muon.scale_by_muon(
        0.9, ns_steps=1, ns_dtype=jnp.float32, momentum_dtype=jnp.bfloat16
    )
    update = jax.jit(transformation.update)
    shape = (8, 12)
    state = transformation.init({"w": jnp.zeros(shape)})
    for seed in range(3):
        grad = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        exact = 0.9 * np.asarray(state.momentum["w"], np.float64) + grad
        updates, state = update({"w": jnp.asarray(grad)}, state)
        assert state.momentum["w"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(state.momentum["w"], exact.astype(ml_dtypes.bfloat16))
        expected = quintic_on_singular_values(grad + 0.9 * exact, 1) * np.sqrt(12 / 8)
        np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


def test_normuon_evens_out_the_neurons_and_keeps_the_norm():
    transformation = muon.scale_by_muon(0.0, ns_steps=5, ns_dtype=jnp.float32, neuron_beta2=0.8)
    shape, running = (12, 30), np.zeros(30)
    state = transformation.init({"w": jnp.zeros(shape)})
    for seed in range(2):
        grad = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        updates, state = jax.jit(transformation.update)({"w": jnp.asarray(grad)}, state)
        orthogonal = quintic_on_singular_values(grad, 5)
        running = 0.8 * running + 0.2 * np.mean(orthogonal**2, axis=0)
        evened = orthogonal / np.sqrt(running)
        evened *= np.linalg.norm(orthogonal) / np.linalg.norm(evened)
        np.testing.assert_allclose(updates["w"], evened * np.sqrt(30 / 12), atol=1e-4)
        np.testing.assert_allclose(state.neuron_squares["w"], running, rtol=1e-4)
    assert np.ptp(np.linalg.norm(orthogonal, axis=0)) > 1.5 * np.ptp(np.linalg.norm(evened, axis=0))


def test_normuon_leaves_zeros_alone_and_is_no_state_unless_asked_for():
    params = {"w": jnp.zeros((4, 6))}
    transformation = muon.scale_by_muon(0.9, neuron_beta2=0.95)
    updates, state = transformation.update(params, transformation.init(params))
    assert not np.any(updates["w"]) and not np.any(state.neuron_squares["w"])
    assert len(jax.tree.leaves(muon.scale_by_muon(0.9).init(params))) == 2
