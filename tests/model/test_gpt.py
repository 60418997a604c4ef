"""The whole model: size, causality, the loss it starts from, and a literal numpy forward pass."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sngpt_kernels.dispatch import Device, targeting

from sngpt_jax.model import layers
from sngpt_jax.model.forward import forward, init_variables, losses
from sngpt_jax.model.gpt import GPT
from tests import oracles
from tests.model.test_techniques import TINY, changed, compiled, double, random_params

TOKENS = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 16))


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_logits_equal_the_oracle(num_layers):
    config = changed(num_layers=num_layers)
    params = random_params(config)
    got = compiled(config)(params, TOKENS)
    assert got.dtype == jnp.float32
    wanted = oracles.gpt(config, double(params), TOKENS)
    np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=2e-4)


def test_bfloat16_stays_near_float32():
    params = random_params(TINY)
    half = compiled(changed(compute_dtype="bfloat16"))(params, TOKENS)
    full = compiled(TINY)(params, TOKENS)
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
    """In a bfloat16 model the products alone are bfloat16: exponentials, square roots and the
    head's result are not.
    """
    half = changed(compute_dtype="bfloat16")
    jaxpr = jax.make_jaxpr(losses(half))(
        random_params(TINY), jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8), jnp.int32)
    )
    seen = {}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in ("exp", "rsqrt", "tanh", "log", "dot_general"):
            dtypes = seen.setdefault(equation.primitive.name, set())
            dtypes.add(equation.invars[0].aval.dtype.name)
        if (
            equation.primitive.name == "dot_general"
            and equation.outvars[0].aval.shape[-1] == half.vocab_size
        ):
            assert equation.outvars[0].aval.dtype == jnp.float32
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
    """d logits[t] / d embedding[s] is zero exactly for s > t, and nothing else is."""
    model = GPT(TINY, rngs=nnx.Rngs(params=jax.random.key(0)))
    graph, _ = nnx.split(model, nnx.Param)
    params = random_params(TINY)
    tokens = jnp.arange(16)[None]  # each token once: row s of the table is position s's input
    untied = jnp.asarray(
        np.random.default_rng(2).normal(size=(TINY.vocab_size, TINY.d_model)), jnp.float32
    )

    def output(table):
        model = nnx.merge(graph, {**params, "embed": {"table": table}})
        encoded = model.embed.encode(tokens)
        model.embed.encode = lambda _: encoded
        model.embed.table = nnx.Param(untied)
        return model(tokens)[0, :, :3]

    jacobian = jax.jacobian(output)(params["embed"]["table"])[:, :, :16]  # [T, 3, S, D]
    size = np.abs(jacobian).max(axis=(1, 3))
    assert np.all(size[np.triu_indices(16, 1)] == 0)
    assert np.all(size[np.tril_indices(16)] > 0)


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
        losses(TINY)(
            random_params(TINY), jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 7), jnp.int32)
        )


def test_blocks_are_named_in_the_program():
    text = (
        jax.jit(forward(TINY))
        .lower(random_params(TINY), jnp.zeros((1, 8), jnp.int32))
        .as_text(debug_info=True)
    )
    for scope in ("embed", "block_0/attention", "block_3/mlp", "head"):
        assert scope in text
