"""The Pallas Triton kernels of attention in a program: their number and their blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.xsa import api as xsa
from sngpt_kernels.xsa import specs
from sngpt_kernels.xsa.pallas_tiles import Blocks, Config

from tests.kernels.lowering import H100, kernels_of_gradients


@pytest.mark.parametrize("exclusive", [False, True])
def test_gradients_are_of_these_kernels(exclusive):
    static = {"exclusive": exclusive, "scale": 0.125, "implementation": "pallas_triton"}

    def loss(q, k, v):
        return jnp.sum(xsa.attention(q, k, v, **static) ** 2)

    q, k = (jax.ShapeDtypeStruct((8, 200, heads, 64), jnp.bfloat16) for heads in (4, 2))
    backward = {"xsa_backward_keys_values": 1, "xsa_backward_queries": 1}
    if exclusive:
        backward["epilogue_backward"] = 1
    for times, function in ((1, loss), (2, jax.checkpoint(loss))):
        kernels = kernels_of_gradients(function, (0, 1, 2), (q, k, k))
        forward = dict.fromkeys(["xsa_forward", *["epilogue_forward"] * exclusive], times)
        assert kernels == forward | backward


def test_blocks_are_those_of_the_devices_table(monkeypatch):
    blocks = {"queries": 32, "keys": 64, "num_warps": 2, "num_stages": 1}
    entry = {"config": {"forward": blocks, "keys_values": blocks, "queries": blocks}}
    table = {"float32_t128_h64": entry}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table if kind == H100.kind else {})
    dtype, tuned = jnp.dtype(jnp.float32), Blocks(32, 64, 2, 1)
    with dispatch.targeting(H100):
        assert Config.of(dtype, 100, 64) == Config(tuned, tuned, tuned)
        assert Config.of(dtype, 200, 64) == Config.heuristic(dtype, 64)
    assert Config.of(dtype, 100, 64) == Config.heuristic(dtype, 64)


@pytest.mark.parametrize("case", specs.CASES, ids=lambda case: case.name)
def test_cases_are_real_shapes(case):
    """Every implementation takes them and returns the shapes that the costs count."""
    arguments = case.abstract()
    with dispatch.targeting(H100):
        # the others ask for a GPU or are not installed
        for implementation in ("xla", "pallas_triton"):
            out = jax.eval_shape(
                lambda *a, name=implementation: case.run(*a, implementation=name), *arguments
            )
            assert out == arguments[0]
    size = sum(array.size * array.dtype.itemsize for array in (arguments[0], *arguments))
    assert case.forward.bytes == size
    B, T, H, h = arguments[0].shape
    assert case.forward.matmul_flops == sum(4 * (t + 1) * h for t in range(T)) * B * H


def test_a_small_case_equals_its_reference():
    (case,) = (case for case in specs.CASES if case.name == "quickstart")
    arguments = case.make(jax.random.key(0))
    error = np.abs(case.run(*arguments, implementation="xla") - case.reference(*arguments))
    print(f"error max {error.max():.1e}, mean {error.mean():.1e}")
    assert error.max() < 1e-5
