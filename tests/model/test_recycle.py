"""The recycled core, and what its applications share with the blocks.

Without skips a model of L layers that applies block i again at its hinge is the model of L + 1
layers with a copy of block i there.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.model.gpt import RecycledCore
from sngpt_jax.model.stream import Stream
from tests import oracles
from tests.model.test_techniques import TINY, changed, functional, logits, random_params

X = np.random.default_rng(0).normal(size=(2, 5, TINY.d_model))


@pytest.mark.parametrize("application", [0, 1, 2])
def test_modulation_equals_the_formula(application):
    fn, params = functional(RecycledCore(changed(recycle_layers=(1, 0, 1))))
    oracles.check(
        lambda p, x: fn(p, application, Stream(x)).array,
        lambda p, x: p["scale"][application] * x + p["bias"][application],
        params,
        X,
    )


def unmodulated(config):
    """Random parameters of `config` with no skips and no modulation."""
    params = random_params(config)
    params["skip_weights"] = 0.0 * params["skip_weights"]
    params["recycle"] = {
        "scale": jnp.ones_like(params["recycle"]["scale"]),
        "bias": 0.0 * params["recycle"]["bias"],
    }
    return params


@pytest.mark.parametrize(
    ("recycled", "fields"),
    [
        ((1,), {}),
        ((0, 1, 0), {"value_residual": True, "attention_gate": True}),
        ((1, 0), {"value_embed_layers": (3, 1), "value_embed_dim": 5, "xsa_layers": 2}),
        ((0,), {"value_residual": True, "value_embed_layers": (1, 0), "value_embed_dim": 5}),
    ],
    ids=str,
)
def test_a_recycled_block_is_a_copy_at_the_hinge(recycled, fields):
    config = changed(recycle_layers=recycled, **fields)
    params = unmodulated(config)
    order = [0, 1, *recycled, 2, 3]
    unrolled = {name: leaf for name, leaf in params.items() if name != "recycle"}
    unrolled["blocks"] = {i: params["blocks"][layer] for i, layer in enumerate(order)}
    unrolled["skip_weights"] = jnp.zeros((len(order) // 2, TINY.d_model))
    # only the block's own application takes the value embedding
    at = (0, 1, len(order) - 2, len(order) - 1)
    embedded = tuple(at[layer] for layer in config.value_embed_layers)
    longer = changed(num_layers=len(order), **{**fields, "value_embed_layers": embedded})
    np.testing.assert_allclose(logits(config, params), logits(longer, unrolled), rtol=0, atol=1e-4)


def test_nothing_is_recycled_unless_asked():
    assert "recycle" not in random_params(TINY)


def test_the_recycled_layers_scale_is_their_own():
    """A replay of layer 0 is scaled by 1, not by the depth at which it runs."""
    plain = changed(num_layers=2, recycle_layers=(0,), mlp_activation="leaky_relu2")
    config = dataclasses.replace(plain, ln_scale=True)
    params = random_params(config)
    silent = {**params["blocks"][1], "attn_scale": jnp.zeros(24), "mlp_scale": jnp.zeros(24)}
    params = {**params, "blocks": {0: params["blocks"][0], 1: silent}}
    assert np.array_equal(logits(config, params), logits(plain, params))


def test_block_zero_mixes_values_only_when_it_runs_again():
    def moved_by_its_mix(config):
        params = random_params(config)
        blocks = {**params["blocks"], 0: {**params["blocks"][0]}}
        blocks[0]["attn"] = {**blocks[0]["attn"], "value_mix": jnp.zeros(2)}
        other = {**params, "blocks": blocks}
        return not np.array_equal(logits(config, params), logits(config, other))

    assert not moved_by_its_mix(changed(value_residual=True))
    assert moved_by_its_mix(changed(value_residual=True, recycle_layers=(0,)))
