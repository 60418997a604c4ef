"""The choice of an implementation of attention, its log line, and the refusals."""

import logging
import sys

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe, Device
from sngpt_kernels.xsa import api

from tests.kernels.lowering import H100

CPU, ROCM = Device("cpu", "cpu"), Device("rocm", "AMD Instinct MI300X")
H200 = Device("cuda", "NVIDIA H200", (9, 0))
T4 = Device("cuda", "Tesla T4", (7, 5))


def abstract(dtype, h, T=1024):
    return jax.ShapeDtypeStruct((48, T, 8, h), dtype)


LOW, WIDE = jnp.bfloat16, jnp.float32
SIZES = "head sizes of 8, 16, … 128"


@pytest.mark.parametrize(
    ("device", "q", "chosen", "reason"),
    [
        (CPU, abstract(WIDE, 64), "xla", "the device is cpu"),
        (CPU, abstract(LOW, 64), "xla", "the device is cpu"),
        (ROCM, abstract(LOW, 64), "xla", "the device is rocm"),
        (H100, abstract(LOW, 64), "cudnn", "bfloat16 on an NVIDIA GPU"),
        (H100, abstract(LOW, 128), "cudnn", "bfloat16 on an NVIDIA GPU"),
        (H100, abstract(LOW, 256), "xla", f"{SIZES}; q has 256"),
        (H100, abstract(LOW, 20), "xla", f"{SIZES}; q has 20"),
        (H100, abstract(WIDE, 64, T=512), "xla", "cudnn serves bfloat16; q is float32"),
        (H100, abstract(WIDE, 64), "pallas_triton", "xla would store 1.5 GiB of scores"),
        (H100, abstract(WIDE, 256), "xla", "pallas_triton serves head sizes"),
        (T4, abstract(LOW, 64, T=512), "xla", "capability 8.0 and later; Tesla T4 has 7.5"),
    ],
)
def test_choice_without_a_measurement(device, q, chosen, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: {})
    choice, said = api.choose(device, q)
    assert choice == chosen and reason in said


def test_a_measurement_decides(monkeypatch):
    """Its entry is for one device, dtype, head size, exclusion and rounded length."""
    entry = {"bfloat16_t1024_h64": {"implementation": "pallas_triton", "config": {}}}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: entry if kind == H100.kind else {})
    q = abstract(LOW, 64)
    reason = f"the fastest measured on {H100.kind}, bfloat16, head size 64, about 1024 positions"
    assert api.choose(H100, q) == ("pallas_triton", reason)
    assert api.choose(H100, abstract(LOW, 64, T=600))[0] == "pallas_triton"
    assert api.choose(H100, abstract(LOW, 64, T=1025))[0] == "cudnn"
    assert api.choose(H200, q)[0] == "cudnn"


def test_a_measurement_of_what_does_not_serve_here_decides_nothing(monkeypatch):
    fastest = {"float32_t512_h64": "cudnn", "float32_t1024_h64": "xla"}
    table = {key: {"implementation": name} for key, name in fastest.items()}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table)
    short, long = abstract(WIDE, 64, T=512), abstract(WIDE, 64)
    assert api.choose(H100, short) == ("xla", "cudnn serves bfloat16; q is float32")
    assert api.choose(H100, long)[0] == "pallas_triton"  # xla would store too much
    monkeypatch.setattr(api, "SCORES_BYTES", 2**40)
    assert api.choose(H100, long)[0] == "xla"


def test_choice_is_said_once(caplog):
    dispatch.log_choice.cache_clear()
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8))
    with caplog.at_level(logging.INFO, logger="sngpt_kernels"):
        for _ in range(3):
            api.attention(q, k, k, exclusive=True, scale=1.0)
        api.attention(q, k, k, exclusive=True, scale=1.0, implementation="xla")
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs as xla: cudnn serves NVIDIA GPUs; the device is cpu",
        "epilogue.finish runs as xla: pallas_triton serves NVIDIA GPUs; the device is cpu",
        "attention runs as xla: as asked",
        "epilogue.finish runs as xla: as asked",
    ]


@pytest.mark.parametrize(
    ("device", "implementation", "q", "reason"),
    [
        (CPU, "cudnn", abstract(LOW, 64), "serves NVIDIA GPUs; the device is cpu"),
        (ROCM, "pallas_triton", abstract(LOW, 64), "serves NVIDIA GPUs; the device is rocm"),
        (H100, "cudnn", abstract(WIDE, 64), "serves bfloat16; q is float32"),
        (H100, "cudnn", abstract(LOW, 136), f"serves {SIZES}; q has 136"),
        (H100, "pallas_triton", abstract(WIDE, 36), f"serves {SIZES}; q has 36"),
    ],
)
def test_cannot_serve_says_why(device, implementation, q, reason):
    def run(q):
        return api.attention(q, q, q, exclusive=True, scale=1.0, implementation=implementation)

    with dispatch.targeting(device), pytest.raises(CannotServe) as caught:
        jax.eval_shape(run, q)
    assert str(caught.value) == f"{implementation} {reason}"


def test_program_without_the_kernels_runs_xla(monkeypatch):
    monkeypatch.setitem(sys.modules, "sngpt_kernels.xsa.pallas_triton", None)
    choice, reason = api.choose(H100, abstract(WIDE, 64))
    assert choice == "xla" and "no part of this program" in reason


Q, K = (1, 4, 2, 8), (1, 4, 1, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "message"),
    [
        (Q[1:], K, K, 1.0, "q is float32 [4, 2, 8]; expected bfloat16 or float32 [B, T, H, h]"),
        (Q, (1, 5, 1, 8), K, 1.0, "k is float32 [1, 5, 1, 8]; expected float32 [1, 4, K, 8]"),
        ((1, 4, 3, 8), Q, Q, 1.0, "with K a divisor of 3"),
        (Q, (4, 1, 8), K, 1.0, "k is float32 [4, 1, 8]"),
        (Q, K, Q, 1.0, "v is float32 [1, 4, 2, 8]; expected float32 [1, 4, 1, 8], as k"),
        (Q, K, K, 0.0, "scale is 0.0; expected a number above 0"),
        (Q, K, K, float("inf"), "scale is inf; expected a number above 0"),
    ],
)
def test_bad_arguments_are_refused(q, k, v, scale, message):
    arrays = [jnp.ones(shape) for shape in (q, k, v)]
    with pytest.raises(ValueError) as caught:
        api.attention(*arrays, exclusive=True, scale=scale)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_dtypes_and_names_are_refused():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="k is bfloat16 .* expected float32"):
        api.attention(q, q.astype(jnp.bfloat16), q, exclusive=False, scale=1.0)
    with pytest.raises(ValueError, match="q is int32"):
        api.attention(q.astype(jnp.int32), q, q, exclusive=False, scale=1.0)
    expected = "expected one of xla, cudnn, pallas_triton, tokamax, fa4_jax, or None"
    with pytest.raises(ValueError, match=f"implementation is 'triton'; {expected}"):
        api.attention(q, q, q, exclusive=False, scale=1.0, implementation="triton")
