"""The choice of an implementation of encode_decode, and the kernels of a program for a GPU."""

import dataclasses
import functools
import logging
import sys

import jax
import jax.numpy as jnp
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.cayley import api
from sngpt_kernels.cayley.api import encode_decode
from sngpt_kernels.cayley.pallas_triton import Config
from sngpt_kernels.dispatch import CannotServe, Device

from tests.kernels.cayley_checks import SHALLOW, make_inputs
from tests.kernels.lowering import H100, kernels_of_gradients

LOW, WIDE = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ONLY_NVIDIA = "xla: pallas_triton serves NVIDIA GPUs; the device is"


@pytest.mark.parametrize(
    ("device", "d", "said"),
    [
        (Device("cpu", "cpu"), 64, f"{ONLY_NVIDIA} cpu"),
        (Device("rocm", "AMD Instinct MI300X"), 64, f"{ONLY_NVIDIA} rocm"),
        (H100, 64, "pallas_triton: on an NVIDIA GPU, where no measurement says another"),
        (H100, 32, "xla: pallas_triton serves widths from 64 to 2048; x has 32"),
        (H100, 4096, "xla: pallas_triton serves widths from 64 to 2048; x has 4096"),
    ],
)
def test_says_once_what_runs_and_why(device, d, said, caplog):
    dispatch.log_choice.cache_clear()
    levels = ((d.bit_length() - 1, 4, 0),)
    x, table = jax.ShapeDtypeStruct((3, d), jnp.float32), jax.ShapeDtypeStruct((d,), jnp.float32)
    with caplog.at_level(logging.INFO, logger="sngpt_kernels"), dispatch.targeting(device):
        for _ in range(2):
            jax.eval_shape(functools.partial(encode_decode, levels=levels), x, table, table, table)
    assert [record.getMessage() for record in caplog.records] == [
        f"cayley.encode_decode runs as {said}"
    ]


def test_the_devices_table_chooses(monkeypatch):
    config = dict.fromkeys((field.name for field in dataclasses.fields(Config)), 2)
    table = {"bfloat16_d64_2l": {"implementation": "xla", "config": config}}
    monkeypatch.setattr(dispatch, "tuned", lambda package, kind: table if kind == H100.kind else {})
    assert api.choose(H100, LOW, SHALLOW, "spread")[0] == "xla"
    assert api.choose(H100, WIDE, SHALLOW, "spread")[0] == "pallas_triton"
    with dispatch.targeting(H100):
        assert Config.of(LOW, SHALLOW) == Config(**config)
        assert Config.of(WIDE, SHALLOW) == Config.heuristic()


def test_a_program_without_the_kernels_runs_xla(monkeypatch):
    monkeypatch.setitem(sys.modules, "sngpt_kernels.cayley.pallas_triton", None)
    reason = "pallas_triton is no part of this program"
    assert api.choose(H100, WIDE, SHALLOW, "spread") == ("xla", reason)


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (((10, 64, 0), (15, 32, 256)), "level 1 has 64 x 256"),
        (((10, 16, 0), (15, 64, 256), (17, 64, 256)), "level 2 has 64 x 256"),
        (((10, 4, 0), (15, 32, 4096)), "level 1 has 4 x 4096"),
    ],
)
def test_levels_that_the_kernels_cannot_hold_run_in_xla(levels, reason, monkeypatch):
    for table in ({}, {f"bfloat16_d1024_{len(levels)}l": {"implementation": "pallas_triton"}}):
        monkeypatch.setattr(dispatch, "tuned", lambda package, kind, table=table: table)
        said = f"pallas_triton keeps candidates in registers; {reason}, too many"
        assert api.choose(H100, LOW, levels, "spread") == ("xla", said)


def test_the_kernels_refuse_a_cpu():
    x, mean, std, bias, _ = make_inputs("random", SHALLOW, 3).values()
    with pytest.raises(CannotServe, match="pallas_triton serves NVIDIA GPUs; the device is cpu"):
        encode_decode(jnp.asarray(x), mean, std, bias, SHALLOW, implementation="pallas_triton")


def test_gradients_are_of_these_kernels():
    def loss(x, mean, std, bias):
        return jnp.sum(encode_decode(x, mean, std, bias, SHALLOW)[0].astype(jnp.float32) ** 2)

    x = jax.ShapeDtypeStruct((8 * 37, 64), jnp.bfloat16)
    arguments = x, *(jax.ShapeDtypeStruct((n,), jnp.float32) for n in (64, 512, 512))
    backward = {"cayley_backward": 1, "cayley_bias_gradient": 1}
    for forward, function in ((1, loss), (2, jax.checkpoint(loss))):
        kernels = kernels_of_gradients(function, (0, 3), arguments)
        assert kernels == {"cayley_forward": forward, **backward}
