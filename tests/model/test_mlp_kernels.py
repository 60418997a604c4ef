"""A model whose MLPs are products with epilogues equals the same model in plain XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.mlp import api, pallas_triton
from sngpt_kernels.stream import api as stream_api
from sngpt_kernels.stream import pallas_triton as stream_kernels

from sngpt_jax.base.errors import UserError
from sngpt_jax.model.forward import losses
from sngpt_jax.model.layers import Observed
from tests.model.test_techniques import TINY, TOKENS, changed, random_params

TILES = pallas_triton.Config(rows=16, columns=4, inner=4)
MODELS = {
    "a stream in XLA": {"num_layers": 2, "stream": "xla"},
    # with skips and a recycled block
    "a stream in kernels": {
        "num_layers": 3,
        "recycle_layers": (1,),
        "mlp_activation": "leaky_relu2",
        "ln_scale": True,
        "stream": "pallas_triton",
    },
}


@pytest.fixture
def calls(monkeypatch):
    """Kernels are interpreted on this device; the list grows by the name of each that is traced."""
    found = []
    functions = {
        "mlp": functools.partial(pallas_triton.residual_mlp, config=TILES, interpret=True),
        "stream": functools.partial(stream_kernels.sum_norm, interpret=True),
    }

    def kernels(operation, _):
        found.append(operation)
        function = staticmethod(functions[operation])
        return type("kernels", (), {"residual_mlp": function, "sum_norm": function})

    monkeypatch.setattr(api, "check", lambda *_: None)
    monkeypatch.setattr(stream_api, "check", lambda *_: None)
    monkeypatch.setattr(dispatch, "pallas_triton", kernels)
    monkeypatch.setattr(stream_kernels.Config, "heuristic", lambda _: stream_kernels.Config(4, 16))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_those_of_xla(name, calls):
    fields = {"rotary": "xla", **MODELS[name]}
    params, tokens = random_params(changed(**fields)), jnp.asarray(TOKENS)

    def value_and_gradients(**fields):
        loss = losses(changed(**fields))
        mean = jax.jit(jax.value_and_grad(lambda p: loss(p, tokens[:, :-1], tokens[:, 1:]).mean()))
        return jax.tree.leaves(mean(params))

    want = value_and_gradients(**fields | {"stream": "xla", "mlp": "xla"})
    assert not calls
    for mine, theirs in zip(value_and_gradients(**fields, mlp="pallas_triton"), want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 + 1e-4 * np.abs(theirs).max())
    blocks = fields["num_layers"] + len(fields.get("recycle_layers", ()))
    assert calls.count("mlp") == blocks
    # the sums before attentions, and the one before the head
    assert calls.count("stream") == (blocks + 1) * (fields["stream"] != "xla")


def test_inputs_of_matrices_are_observed_in_plain_products(calls):
    """Calibration sees the inputs of `out`, `up` and `down`, which the kernels would hide."""
    config = changed(num_layers=1, mlp="pallas_triton", stream="xla", rotary="xla")
    params, seen = random_params(config), []
    mlp = params["blocks"][0]["mlp"]
    params["blocks"][0]["mlp"] = mlp | {"down": Observed(mlp["down"], seen)}
    losses(config)(params, TOKENS[:, :-1], TOKENS[:, 1:])
    assert not calls and seen[0].shape == (2, 8, TINY.mlp_dim)


def test_a_device_without_the_kernels_is_named():
    config = changed(num_layers=1, mlp="pallas_triton")
    with pytest.raises(
        UserError, match="^model.mlp: pallas_triton serves NVIDIA GPUs; .*; set it to auto"
    ):
        jax.eval_shape(losses(config), random_params(config), TOKENS[:, :-1], TOKENS[:, 1:])
