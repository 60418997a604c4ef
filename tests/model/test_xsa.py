"""Exclusive self-attention in the model: the layers that use it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sngpt_jax.model.attention import Attention, make_positions
from tests.model.test_techniques import TINY, changed, logits, random_params


def test_the_last_layers_use_it():
    """A layer's own output changes exactly where the layer is one of the last `xsa_layers`."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(2, 8, TINY.d_model)), jnp.float32)

    @functools.cache
    def output(layer, xsa_layers):
        config = changed(xsa_layers=xsa_layers)
        attention = Attention(config, layer, rngs=nnx.Rngs(params=jax.random.key(layer)))
        attention.out[...] = jnp.eye(TINY.d_model)
        return np.asarray(attention(x, make_positions(config, 8))[0])

    for xsa_layers in (1, 3):
        for layer in range(4):
            same = np.array_equal(output(layer, xsa_layers), output(layer, 0))
            assert same == (layer < 4 - xsa_layers)


@pytest.mark.parametrize("xsa_layers", [1, 3])
def test_earlier_layers_of_the_model_are_unaffected(xsa_layers):
    """With the outputs of the last layers silenced nothing of XSA is left; the first one shows."""
    params = random_params(TINY)
    first = TINY.num_layers - xsa_layers
    exclusive = changed(xsa_layers=xsa_layers)

    def with_silent(layers):
        silent = {i: {**params["blocks"][i], "attn_scale": jnp.zeros(24)} for i in layers}
        return {**params, "blocks": params["blocks"] | silent}

    silent = with_silent(range(first, TINY.num_layers))
    assert np.array_equal(logits(exclusive, silent), logits(TINY, silent))
    heard = with_silent(range(first + 1, TINY.num_layers))
    assert np.abs(logits(exclusive, heard) - logits(TINY, heard)).max() > 1e-3
