"""The MLP's activations and its width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sngpt_kernels.dispatch import current_device, targeting

from sngpt_jax.ahead.targets import find
from sngpt_jax.config import ModelConfig
from sngpt_jax.model.mlp import ACTIVATIONS, MLP
from tests import oracles
from tests.model.test_techniques import TINY, changed, functional

H100 = find("h100")
ORACLES = {"relu2": oracles.relu2, "leaky_relu2": oracles.leaky_relu2}


@pytest.mark.parametrize("device", [current_device(), H100.device])
def test_activations_by_hand(device):
    with targeting(device):
        activations_by_hand()


def test_gradient_of_gelu_on_a_gpu_keeps_its_input_alone():
    with targeting(H100.device):
        _, backward = jax.vjp(ACTIVATIONS["gelu"], jnp.ones(5, jnp.bfloat16))
    assert [leaf.size for leaf in jax.tree.leaves(backward)] == [5]


def activations_by_hand():
    h = jnp.asarray([-3.0, -1.0, 0.0, 0.5, 2.0])
    assert ACTIVATIONS["relu2"](h).tolist() == [0.0, 0.0, 0.0, 0.25, 4.0]
    assert ACTIVATIONS["leaky_relu2"](h).tolist() == [2.25, 0.25, 0.0, 0.25, 4.0]
    # h Φ(h), with Φ(1/2) = 0.6914625, Φ(1) = 0.8413447, Φ(2) = 0.9772499, Φ(3) = 0.9986501
    np.testing.assert_allclose(
        ACTIVATIONS["gelu"](h), [-0.0040497, -0.1586553, 0.0, 0.3457312, 1.9544997], atol=1e-6
    )
    slopes = {name: jax.vmap(jax.grad(f))(h).tolist() for name, f in ACTIVATIONS.items()}
    # Φ(h) + h φ(h), with φ(1/2) = 0.3520653, φ(1) = 0.2419707, φ(2) = 0.0539910, φ(3) = 0.0044318
    np.testing.assert_allclose(
        slopes.pop("gelu"), [-0.0119456, -0.0833155, 0.5, 0.8674952, 1.0852318], atol=1e-6
    )
    assert slopes == {
        "relu2": [0.0, 0.0, 0.0, 1.0, 4.0],
        "leaky_relu2": [-1.5, -0.5, 0.0, 1.0, 4.0],
    }


@pytest.mark.parametrize("name", ORACLES)
def test_layer_equals_the_formula(name):
    config = changed(mlp_activation=name)
    fn, params = functional(MLP(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    x = np.random.default_rng(0).normal(size=(2, 3, TINY.d_model))
    oracles.check(fn, lambda p, x: ORACLES[name](x @ p["up"]) @ p["down"], params, x)


@pytest.mark.parametrize(("multiple", "width"), [(2.75, 1408), (3.0, 1536), (0.001, 1)])
def test_width_is_any(multiple, width):
    config = ModelConfig(mlp_dim=max(int(multiple * 512), 1), compute_dtype="float32")
    shapes = nnx.eval_shape(lambda: MLP(config, rngs=nnx.Rngs(params=jax.random.key(0))))
    assert shapes.up.shape == (512, width) and shapes.down.shape == (width, 512)
