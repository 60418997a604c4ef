"""What a layer's attention may take beside its input: an embedding of the token, the first layer's
values, a gate.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sngpt_jax.model.attention import Attention, make_positions
from tests import oracles
from tests.model.test_techniques import TINY, changed, functional, logits, random_params

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, TINY.d_model))
ADDED, FIRST = RNG.normal(size=(2, 2, 5, TINY.num_kv_heads, TINY.head_dim))


def attention_of(config, layer):
    return functional(Attention(config, layer, rngs=nnx.Rngs(params=jax.random.key(0))))


@pytest.mark.parametrize(
    ("fields", "layer", "given"),
    [
        ({}, 1, []),
        ({}, 1, ["added"]),
        ({"value_residual": True}, 0, []),
        ({"value_residual": True}, 1, ["first"]),
        ({"value_residual": True}, 1, ["added", "first"]),
        ({"attention_gate": True}, 1, []),
        (
            {"attention_gate": True, "value_residual": True, "xsa_layers": 1, "rope_dims": 4},
            3,
            ["added", "first"],
        ),
    ],
    ids=str,
)
def test_layer_equals_the_formula(fields, layer, given):
    config = changed(**fields)
    fn, params = attention_of(config, layer)

    def ours(params, x, **values):
        names = {"added": "added_value", "first": "first_value"}
        return fn(
            params,
            x,
            make_positions(config, 5),
            **{names[name]: value for name, value in values.items()},
        )[0]

    def oracle(params, x, **values):
        return oracles.attention(
            config, layer, params, x, added_v=values.get("added"), first_v=values.get("first")
        )[0]

    values = {name: {"added": ADDED, "first": FIRST}[name] for name in given}
    oracles.check(
        lambda p, x, v: ours(p, x, **v),
        lambda p, x, v: oracle(p, x, **v),
        params,
        X,
        values,
        tol=5e-5,
    )


def with_attention(params, **leaves):
    blocks = {
        i: {**block, "attn": {**block["attn"], **leaves}} for i, block in params["blocks"].items()
    }
    return {**params, "blocks": blocks}


def test_open_gates_do_nothing():
    config = changed(attention_gate=True)
    opened = with_attention(
        random_params(config), gate_weight=jnp.zeros((24, 4)), gate_bias=jnp.full(4, 200.0)
    )
    np.testing.assert_allclose(logits(config, opened), logits(TINY), rtol=0, atol=1e-5)


def test_shut_gates_silence_the_attention():
    config = changed(attention_gate=True)
    shut = with_attention(
        random_params(config), gate_weight=jnp.zeros((24, 4)), gate_bias=jnp.full(4, -200.0)
    )
    without = with_attention(random_params(TINY), out=jnp.zeros((24, 24)))
    np.testing.assert_allclose(logits(config, shut), logits(TINY, without), rtol=0, atol=1e-5)


def test_one_gate_acts_on_its_own_head():
    fn, params = attention_of(changed(attention_gate=True), 1)
    positions = make_positions(TINY, 5)
    x = jnp.asarray(X, jnp.float32)
    params = {**params, "out": jnp.eye(24), "gate_weight": jnp.zeros((24, 4))}
    opened = fn({**params, "gate_bias": jnp.full(4, 200.0)}, x, positions)[0].reshape(2, 5, 4, 6)
    halved = fn({**params, "gate_bias": jnp.full(4, 200.0).at[2].set(0.0)}, x, positions)[
        0
    ].reshape(2, 5, 4, 6)
    np.testing.assert_allclose(halved, opened.at[:, :, 2].multiply(0.5), rtol=1e-6)


def test_own_values_alone_are_no_residual():
    config = changed(value_residual=True)
    own = with_attention(random_params(config), value_mix=jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(logits(config, own), logits(TINY), rtol=0, atol=1e-5)


def test_first_values_alone_leave_the_other_layers_value_matrices_unused():
    config = changed(value_residual=True)
    first = with_attention(random_params(config), value_mix=jnp.asarray([1.0, 0.0]))

    def scaled(layer):
        block = first["blocks"][layer]
        attn = {**block["attn"], "value": 2.0 * block["attn"]["value"]}
        return {**first, "blocks": {**first["blocks"], layer: {**block, "attn": attn}}}

    same = [
        np.array_equal(logits(config, scaled(layer)), logits(config, first)) for layer in range(4)
    ]
    assert same == [False, True, True, True]


def test_residual_takes_the_first_layers_values_not_the_stream():
    """With layer 0's attention silenced its value matrix still matters, through the residual
    alone.
    """

    def depends_on_the_first_value_matrix(config):
        params = random_params(config)
        block = {**params["blocks"][0], "attn_scale": jnp.zeros(24)}
        other = {**block, "attn": {**block["attn"], "value": -block["attn"]["value"]}}
        runs = [
            logits(config, {**params, "blocks": {**params["blocks"], 0: b}}) for b in (block, other)
        ]
        return not np.array_equal(*runs)

    assert not depends_on_the_first_value_matrix(TINY)
    assert depends_on_the_first_value_matrix(changed(value_residual=True))
