"""The Pallas Triton kernels of attention in a program: their number and their blocks."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec
from sngpt_kernels import dispatch
from sngpt_kernels.case import Case
from sngpt_kernels.xsa import api as xsa
from sngpt_kernels.xsa import pallas_triton, reference, specs
from sngpt_kernels.xsa.pallas_tiles import Blocks, Config

from sngpt_jax.ahead import targets

H100 = targets.find("h100").device


def kernels_of_gradients(exclusive: bool, wrap: Callable) -> Counter[str]:
    """The kernels by name in the program of a value and its gradients, lowered for 8 GPUs."""
    target = targets.find("h100")
    gpu = AbstractDevice(device_kind=target.kind, num_cores=target.sms, platform="gpu")
    mesh = AbstractMesh(
        (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=gpu
    )

    static = {"exclusive": exclusive, "scale": 0.125, "implementation": "pallas_triton"}

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(xsa.attention(q, k, v, **static) ** 2)

    def step(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        value, gradients = jax.value_and_grad(wrap(loss), argnums=(0, 1, 2))(*arrays)
        return value[None], *gradients

    rows = PartitionSpec("data")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    q, k = (jax.ShapeDtypeStruct((8, 200, heads, 64), jnp.bfloat16) for heads in (4, 2))
    with dispatch.targeting(target.device):
        text = jax.jit(sharded).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    return Counter(re.findall(r'name = "(xsa_\w+)"', text))


@pytest.mark.parametrize("exclusive", [False, True])
def test_gradients_are_of_these_kernels(exclusive: bool) -> None:
    prepare = {"xsa_prepare_backward": 1} if exclusive else {}
    backward = {"xsa_backward_keys_values": 1, "xsa_backward_queries": 1, **prepare}
    assert kernels_of_gradients(exclusive, lambda loss: loss) == {"xsa_forward": 1, **backward}
    assert kernels_of_gradients(exclusive, jax.checkpoint) == {"xsa_forward": 2, **backward}


def test_blocks_are_those_of_the_devices_table(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"queries": 32, "keys": 64, "num_warps": 2, "num_stages": 1}
    entry = {"config": {"forward": blocks, "keys_values": blocks, "queries": blocks}}
    monkeypatch.setattr(
        dispatch,
        "tuned",
        lambda package, kind: {"float32_t128_h64": entry} if kind == H100.kind else {},
    )
    dtype, tuned = jnp.dtype(jnp.float32), Blocks(32, 64, 2, 1)
    with dispatch.targeting(H100):
        assert Config.of(dtype, 100, 64, exclusive=False) == Config(tuned, tuned, tuned)
        assert Config.of(dtype, 100, 64, exclusive=True) == Config.heuristic(dtype, 64)
    assert Config.of(dtype, 100, 64, exclusive=False) == Config.heuristic(dtype, 64)


@pytest.mark.parametrize(
    ("blocks", "length"),
    [((16, 32), 1), ((32, 16), 16), ((16, 32), 31), ((32, 16), 64), ((64, 16), 65)],
)
def test_any_tiles_and_lengths(blocks: tuple[int, int], length: int) -> None:
    """Tiles that are longer than the text, as long, that divide it, and that do not."""
    rng = np.random.default_rng(length)
    q, k, v, cotangent = (
        rng.normal(size=(1, length, heads, 16)).astype(np.float32) for heads in (2, 1, 1, 2)
    )
    config = Config(*(Blocks(*blocks, 4, 2),) * 3)

    @jax.jit
    def run(q: Any, k: Any, v: Any, cotangent: Any) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(
            lambda *a: pallas_triton.attention(*a, True, 0.3, config=config, interpret=True),
            q,
            k,
            v,
        )
        return out, *vjp(cotangent)

    want = (
        reference.attention(q, k, v, exclusive=True, scale=0.3),
        *reference.gradients(q, k, v, cotangent, exclusive=True, scale=0.3),
    )
    for mine, theirs in zip(run(q, k, v, cotangent), want, strict=True):
        print(f"error max {np.abs(mine - theirs).max():.1e} of {np.abs(theirs).max():.1e}")
        np.testing.assert_allclose(mine, theirs, atol=4e-6 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize("case", specs.CASES, ids=lambda case: case.name)
def test_cases_are_real_shapes(case: Case) -> None:
    """Every implementation takes them and returns the shapes that the costs count."""
    arguments = case.abstract()
    with dispatch.targeting(H100):
        # cudnn asks for a GPU while it is traced
        for implementation in set(case.implementations) - {"cudnn"}:
            out = jax.eval_shape(
                lambda *a, name=implementation: case.run(*a, implementation=name), *arguments
            )
            assert out == arguments[0]
    size = sum(array.size * array.dtype.itemsize for array in (arguments[0], *arguments))
    assert case.forward.bytes == size
    B, T, H, h = arguments[0].shape
    assert case.forward.matmul_flops == sum(4 * (t + 1) * h for t in range(T)) * B * H


def test_a_small_case_equals_its_reference() -> None:
    (case,) = (case for case in specs.CASES if case.name == "quickstart")
    arguments = case.make(jax.random.key(0))
    error = np.abs(case.run(*arguments, implementation="xla") - case.reference(*arguments))
    print(f"error max {error.max():.1e}, mean {error.mean():.1e}")
    assert error.max() < 1e-5
