"""`linear` against numpy, its values and both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.model.layers import Observed, linear

B, T, N = 2, 5, 7


def draw(*shape):
    return np.random.default_rng(shape).normal(size=shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("widths", [(3,), (4, 2, 9)])
def test_values_and_gradients_are_those_of_the_product(widths, dtype, tolerance):
    x, matrices, dy = draw(B, T, N), [draw(N, m) for m in widths], draw(B, T, sum(widths))
    y, pull = jax.vjp(linear, jnp.asarray(x, dtype), *map(jnp.float32, matrices))
    dx, *dmatrices = pull(jnp.asarray(dy, dtype))

    beside = np.concatenate(matrices, axis=1)
    rows, drows = x.reshape(-1, N), dy.reshape(-1, sum(widths))
    dparts = np.split(rows.T @ drows, np.cumsum(widths)[:-1], axis=1)
    expected = (x @ beside, dy @ beside.T, *dparts)
    for got, want in zip((y, dx, *dmatrices), expected, strict=True):
        atol = tolerance * np.abs(want).max()
        np.testing.assert_allclose(np.float64(got), want, rtol=tolerance, atol=atol)
    assert y.dtype == dx.dtype == dtype and all(d.dtype == jnp.float32 for d in dmatrices)


def test_the_gradient_of_the_matrix_takes_no_transposed_copy_of_the_outputs():
    """jax's gradient is the transpose of dyᵀ x, and a CPU's compiler copies dy for it."""
    x, matrix = jnp.ones((8, 64, 32)), jnp.ones((32, 96))
    step = jax.jit(jax.grad(lambda x, m: jnp.sum(jnp.sin(linear(x, m))), argnums=1))
    program = step.lower(x, matrix).compile().as_text()
    assert "dot(" in program and "f32[96,512]" not in program


def test_observed_matrices_see_what_they_are_multiplied_with():
    x, seen = jnp.asarray(draw(B, T, N), jnp.float32), []
    matrices = [jnp.asarray(draw(N, m), jnp.float32) for m in (3, 4)]
    y = linear(x, Observed(matrices[0], seen), matrices[1])
    assert len(seen) == 1 and seen[0] is x
    np.testing.assert_array_equal(y, linear(x, *matrices))
