"""The device that code is traced for, and derivatives that are refused."""

import functools

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.cayley import pallas_triton as cayley_kernels
from sngpt_kernels.cayley.dictionary import Scheme
from sngpt_kernels.dispatch import CannotServe
from sngpt_kernels.xsa import pallas_triton as xsa_kernels

from tests.kernels.cayley_checks import SHALLOW, make_inputs
from tests.kernels.lowering import H100


def test_the_device_is_the_one_aimed_at_else_jaxs_default():
    here = dispatch.current_device()
    assert here.platform == jax.devices()[0].platform == "cpu"
    with jax.default_device("cpu"):
        assert dispatch.current_device() == here
    with jax.default_device(jax.devices()[1]), dispatch.targeting(H100):
        assert dispatch.current_device() == H100
    assert dispatch.current_device() == here


def test_the_default_device_decides_before_the_first_one(monkeypatch):
    """On a machine with a GPU, inside jax.default_device(cpu)."""

    class Gpu:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H100 80GB HBM3", "9.0"
        client = type("client", (), {"platform_version": "PJRT C API, cuda 13000"})

    cpu, gpu = jax.devices()[0], Gpu()
    monkeypatch.setattr(jax, "devices", lambda platform=None: [cpu] if platform == "cpu" else [gpu])
    assert dispatch.current_device() == H100
    for default in (cpu, "cpu"):
        with jax.default_device(default):
            assert dispatch.current_device().platform == "cpu"


def test_gradients_of_gradients_are_refused_in_a_sentence():
    x, mean, std, bias, _ = map(jnp.asarray, make_inputs("random", SHALLOW, 3).values())

    def code(x):
        kernels = functools.partial(cayley_kernels.encode_decode, interpret=True)
        return jnp.sum(kernels(x, mean, std, bias, Scheme(SHALLOW))[0] ** 2)

    def attend(q):
        return jnp.sum(xsa_kernels.attention(q, q, q, 1.0, interpret=True) ** 2)

    for function, argument, operation in (
        (code, x, "cayley.encode_decode"),
        (attend, jnp.ones((1, 5, 2, 16)), "attention"),
    ):
        refused = f"pallas_triton: the gradient of {operation} has no derivative; xla has one"
        with pytest.raises(CannotServe) as caught:
            jax.eval_shape(
                jax.grad(lambda y, function=function: jnp.sum(jax.grad(function)(y))), argument
            )
        assert str(caught.value) == refused
