"""Attention by tokamax and fa4-jax: when they serve, and their plain versions by the definition.

The plain versions check how the arguments are passed on. Their kernels need a GPU.
"""

import importlib.util
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.epilogue.api import finish
from sngpt_kernels.xsa import api, libraries

from tests.kernels.lowering import H100
from tests.kernels.test_xsa_attention import SHAPES, check, draw, expected, value_and_gradients

CPU = Device("cpu", "cpu")
A100 = Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
INSTALLED = [name for name in api.LIBRARIES if importlib.util.find_spec(name)]
LIBRARIES = pytest.mark.parametrize("library", api.LIBRARIES)


if INSTALLED:  # .ci/other_pythons installs them

    @pytest.mark.parametrize("library", INSTALLED)
    @pytest.mark.parametrize("exclusive", [False, True])
    def test_equals_the_definition(library, exclusive):
        def function(q, k, v, *, exclusive, scale):
            y = libraries.attention(library, q, k, v, scale, plain=True)
            return finish(y, v if exclusive else None)

        arrays, static = draw(SHAPES[0]), {"exclusive": exclusive, "scale": 0.3}
        got = value_and_gradients(function, *arrays, **static)
        check(got, expected(*arrays, **static), 3e-6)


@pytest.fixture
def installed(monkeypatch):
    """A function that makes libraries look installed, or look missing."""

    def pretend(*names):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: (name in names or None) if name in api.LIBRARIES else found(name),
        )

    return pretend


def refusal(library, device, dtype=jnp.bfloat16, h=64):
    q = jax.ShapeDtypeStruct((2, 64, 8, h), dtype)
    with pytest.raises(CannotServe) as caught:
        api.check(library, device, q)
    return str(caught.value)


@LIBRARIES
def test_cannot_serve_says_why(library, installed, monkeypatch):
    installed(*api.LIBRARIES)
    assert refusal(library, CPU) == f"{library} serves NVIDIA GPUs; the device is cpu"
    assert refusal(library, H100, jnp.float32) == f"{library} serves bfloat16; q is float32"
    assert "head sizes of 8, 16, … 128; q has 136" in refusal(library, H100, h=136)
    thor = Device("cuda", "NVIDIA Thor", (11, 0))
    assert refusal(library, thor).endswith("; NVIDIA Thor has 11.0")
    installed()
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    assert refusal(library, H100).endswith("is not installed; Python 3.11 is too old for it")
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    assert "not installed; run: pip install 'sngpt-jax[attention]'" in refusal(library, H100)
    monkeypatch.setitem(dispatch._distrusted, "xsa", "it was wrong")
    assert refusal(library, H100) == f"{library} is not used: it was wrong"


def test_devices_with_kernels(installed):
    installed(*api.LIBRARIES)
    api.check("tokamax", H100, jax.ShapeDtypeStruct((2, 64, 8, 64), jnp.bfloat16))
    assert "serves compute capabilities 9.x and 10.x" in refusal("tokamax", A100)
    # without a GPU it has no kernel for another one
    assert refusal("fa4_jax", H100) == "fa4_jax compiles on a machine with a GPU only"


def test_a_measurement_chooses_a_library(installed, monkeypatch):
    entry = {"bfloat16_t1024_h64": {"implementation": "tokamax"}}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: entry)
    q = jax.ShapeDtypeStruct((8, 1024, 8, 64), jnp.bfloat16)
    installed()
    assert api.choose(H100, q)[0] == "cudnn"
    installed("tokamax")
    assert api.choose(H100, q)[0] == "tokamax"


@LIBRARIES
def test_a_program_passes_its_arguments_on(library, installed, monkeypatch):
    """Nothing imports a library before it is chosen."""
    called = []
    installed(*api.LIBRARIES)
    monkeypatch.setattr(libraries, "check", lambda *arguments: None)
    monkeypatch.setattr(libraries, "attention", lambda name, *a: called.append((name, *a)) or a[0])
    q = jax.ShapeDtypeStruct((2, 64, 8, 64), jnp.bfloat16)
    run = partial(api.attention, exclusive=False, scale=0.5, implementation=library)
    with dispatch.targeting(H100):
        assert jax.eval_shape(run, q, q, q).shape == q.shape
    assert called[0][0] == library and called[0][-1] == 0.5
