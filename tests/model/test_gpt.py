"""The whole model: size, causality, the loss it starts from, and a literal numpy forward pass."""

import math
from collections import defaultdict

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels.dispatch import Device, targeting

from sngpt_jax.model import layers
from sngpt_jax.model.forward import forward, hidden, init_variables, losses
from tests import oracles
from tests.model.test_techniques import TINY, changed, compiled, double, random_params

TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 16))
EIGHT = jnp.zeros((1, 8), jnp.int32)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_logits_equal_the_oracle(num_layers):
    config = changed(num_layers=num_layers)
    params = random_params(config)
    got = compiled(config)(params, TOKENS)
    assert got.dtype == jnp.float32
    wanted = oracles.gpt(config, double(params), TOKENS)
    np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=2e-4)


def test_bfloat16_stays_near_float32():
    half, full = (
        compiled(changed(compute_dtype=dtype))(random_params(TINY), TOKENS)
        for dtype in ("bfloat16", "float32")
    )
    assert half.dtype == jnp.float32
    assert np.linalg.norm(half - full) < 0.05 * np.linalg.norm(full)
    assert np.any(half != full)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_bfloat16_keeps_softmax_statistics_and_logits_in_float32():
    half = changed(compute_dtype="bfloat16")
    jaxpr = jax.make_jaxpr(losses(half))(random_params(TINY), EIGHT, EIGHT)
    seen = defaultdict(set)
    for equation in equations(jaxpr.jaxpr):
        name, (result, *_) = equation.primitive.name, equation.outvars
        if name in ("exp", "rsqrt", "tanh", "log", "dot_general"):
            seen[name].add(equation.invars[0].aval.dtype.name)
        if name == "dot_general" and result.aval.shape[-1] == half.vocab_size:
            assert result.aval.dtype == jnp.float32
    assert seen.pop("dot_general") == {"bfloat16"}
    assert seen == {name: {"float32"} for name in ("exp", "rsqrt", "tanh", "log")}


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16"), ("tpu", "bfloat16")]
)
def test_auto_dtype_is_that_of_the_device(platform, dtype):
    with targeting(Device(platform, "any")):
        assert layers.compute_dtype(changed(compute_dtype="auto")) == jnp.dtype(dtype)
        assert layers.compute_dtype(TINY) == jnp.float32


def test_no_output_depends_on_a_later_token():
    """d hidden[t] / d embedding[s] is zero exactly for s > t, and nothing else is."""
    config, T = changed(num_layers=2), 8
    params, apply = random_params(config), hidden(config)
    tokens = jnp.arange(T)[None]  # each token once: row s of the table is position s's input

    def output(table):
        return apply({**params, "embed": {"table": table}}, tokens)[0, :, :3]

    jacobian = jax.jit(jax.jacobian(output))(params["embed"]["table"])[:, :, :T]  # [T, 3, S, D]
    size = np.abs(jacobian).max(axis=(1, 3))
    assert np.all(size[np.triu_indices(T, 1)] == 0)
    assert np.all(size[np.tril_indices(T)] > 0)


def test_loss_at_the_start_is_ln_v():
    config = changed(vocab_size=1024, d_model=64)
    params = init_variables(config, jax.random.key(0))[0]
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 1024)
    loss = jax.jit(losses(config))(params, tokens[:, :-1], tokens[:, 1:]).mean()
    assert loss == pytest.approx(math.log(1024), abs=0.02)


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="17 tokens.*max_seq_len = 16"):
        forward(TINY)(random_params(TINY), jnp.zeros((1, 17), jnp.int32))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError):
        forward(TINY)(random_params(TINY), jnp.zeros(8, jnp.int32))
    with pytest.raises(AssertionError):
        losses(TINY)(random_params(TINY), EIGHT, EIGHT[:, 1:])


def test_blocks_are_named_in_the_program():
    text = compiled(TINY).lower(random_params(TINY), EIGHT).as_text(debug_info=True)
    for scope in ("embed", "block_0/attention", "block_3/mlp", "head"):
        assert scope in text
