"""What a layer's attention may take beside its input: added values, first values, a gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sngpt_kernels import dispatch
from sngpt_kernels.rotary import pallas_triton as rotary_kernels

from sngpt_jax.model.attention import Attention, make_positions
from tests import oracles
from tests.model.test_techniques import TINY, changed, functional, logits, random_params

GATED = {"attention_gate": True}
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
        (GATED, 1, []),
        ({**GATED, "value_residual": True, "xsa_layers": 1, "rope_dims": 4}, 3, ["added", "first"]),
    ],
    ids=str,
)
def test_layer_equals_the_formula(fields, layer, given):
    config = changed(**fields)
    fn, params = attention_of(config, layer)

    def ours(params, x, values):
        named = {f"{name}_value": value for name, value in values.items()}
        return fn(params, x, make_positions(config, 5), **named)[0]

    def oracle(params, x, values):
        named = {f"{name}_v": value for name, value in values.items()}
        return oracles.attention(config, layer, params, x, **named)[0]

    values = {name: {"added": ADDED, "first": FIRST}[name] for name in given}
    oracles.check(ours, oracle, params, X, values, tol=5e-5)


def test_logits_of_the_gate_are_a_head_of_the_one_product(monkeypatch):
    """The kernel of queries and keys writes them apart. Their gradients join those of the heads."""
    counts = []

    def prepare(*arguments):
        counts.append((arguments[0].shape[2], arguments[-1]))
        return rotary_kernels.prepare(*arguments, interpret=True)

    kernels = type("kernels", (), {"prepare": staticmethod(prepare)})
    monkeypatch.setattr(dispatch, "check_heads", lambda *_: None)
    monkeypatch.setattr(dispatch, "pallas_triton", lambda *_: kernels)
    test_layer_equals_the_formula({**GATED, "rotary": "pallas_triton", "attention": "xla"}, 1, [])
    H, K = TINY.num_heads, TINY.num_kv_heads
    assert set(counts) == {(H + 2 * K + 1, (K, 1))}


def with_attention(params, layers=range(4), **leaves):
    blocks = dict(params["blocks"])
    for i in layers:
        blocks[i] = {**blocks[i], "attn": {**blocks[i]["attn"], **leaves}}
    return {**params, "blocks": blocks}


def test_open_gates_do_nothing_and_shut_ones_silence_the_attention():
    without = with_attention(random_params(TINY), out=jnp.zeros((24, 24)))
    for bias, plain in ((200.0, random_params(TINY)), (-200.0, without)):
        gates = {"gate_weight": jnp.zeros((24, 4)), "gate_bias": jnp.full(4, bias)}
        gated = logits(changed(**GATED), with_attention(random_params(changed(**GATED)), **gates))
        np.testing.assert_allclose(gated, logits(TINY, plain), rtol=0, atol=1e-5)


def test_one_gate_acts_on_its_own_head():
    fn, params = attention_of(changed(**GATED), 1)
    params = {**params, "out": jnp.eye(24), "gate_weight": jnp.zeros((24, 4))}
    opened, halved = (
        fn({**params, "gate_bias": bias}, jnp.float32(X), make_positions(TINY, 5))[0]
        for bias in (jnp.full(4, 200.0), jnp.full(4, 200.0).at[2].set(0.0))
    )
    np.testing.assert_allclose(halved, opened.at[:, :, 12:18].multiply(0.5), rtol=1e-6)


def test_own_values_alone_are_no_residual():
    config = changed(value_residual=True)
    own = with_attention(random_params(config), value_mix=jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(logits(config, own), logits(TINY), rtol=0, atol=1e-5)


def test_first_values_alone_leave_the_other_layers_value_matrices_unused():
    config = changed(value_residual=True)
    first = with_attention(random_params(config), value_mix=jnp.asarray([1.0, 0.0]))
    for layer, block in first["blocks"].items():
        scaled = with_attention(first, [layer], value=2.0 * block["attn"]["value"])
        assert np.array_equal(logits(config, scaled), logits(config, first)) == (layer > 0)


def test_residual_takes_the_first_layers_values_not_the_stream():
    """With layer 0's attention silenced its value matrix still matters, through the residual."""

    def depends_on_the_first_value_matrix(config):
        params = random_params(config)
        params["blocks"][0]["attn_scale"] = jnp.zeros(24)
        other = with_attention(params, [0], value=-params["blocks"][0]["attn"]["value"])
        return not np.array_equal(logits(config, params), logits(config, other))

    assert not depends_on_the_first_value_matrix(TINY)
    assert depends_on_the_first_value_matrix(changed(value_residual=True))
