"""A model whose stream is summed by kernels equals the same model in plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.stream import api, pallas_triton

from sngpt_jax.model.forward import losses
from tests.model import test_pre_norm
from tests.model.test_techniques import TOKENS, changed, random_params

MODELS = {
    "compact without a core": changed(num_layers=2, rotary="xla"),
    "compact": changed(num_layers=2, recycle_layers=(0,), attention_gate=True, rotary="xla"),
    "pre_norm": dataclasses.replace(test_pre_norm.DENSE, rotary="xla", num_layers=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_those_of_xla(name, monkeypatch):
    params = random_params(MODELS[name])

    def value_and_gradients(implementation):
        config = dataclasses.replace(MODELS[name], stream=implementation)
        loss = losses(config)
        tokens = jnp.asarray(TOKENS)
        mean = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens[:, :-1], tokens[:, 1:]).mean()))
        return jax.tree.leaves(mean(params))

    want = value_and_gradients("xla")
    calls = []

    def interpreted(*arguments):
        calls.append(sum(len(group) for group in arguments[0]))
        return pallas_triton.sum_norm(*arguments, interpret=True)

    kernels = type("kernels", (), {"sum_norm": staticmethod(interpreted)})
    monkeypatch.setattr(api, "check", lambda *_: None)
    monkeypatch.setattr(dispatch, "pallas_triton", lambda *_: kernels)
    for mine, theirs in zip(value_and_gradients("pallas_triton"), want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 + 1e-4 * np.abs(theirs).max())
    halves = 2 * (MODELS[name].num_layers + len(MODELS[name].recycle_layers))
    assert len(calls) == halves + 1  # each norm of the stream is in one kernel
