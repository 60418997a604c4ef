"""Descriptions of GPUs: topologies, limits, and compiling for absent devices."""

import re
import subprocess
import sys

import pytest

from sngpt_jax.ahead import targets


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [("h100x1", "h100", 1), ("h100x8", "h100", 8), ("h200x2", "h200", 2), ("b200x16", "b200", 16)],
)
def test_topologies(text: str, name: str, count: int) -> None:
    target, devices = targets.parse_topology(text)
    assert (target.name, devices) == (name, count)


@pytest.mark.parametrize(
    "text",
    ["", "h100", "h100x", "h100x0", "h100x-1", "h100x08", "x8", "8xh100", "H100x8", "v100x8"],
)
def test_malformed_topologies(text: str) -> None:
    expected = "is no topology; expected DEVICExNUMBER, such as h100x8, with a DEVICE of: a100,"
    with pytest.raises(ValueError, match=expected) as error:
        targets.parse_topology(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


def test_several_machines_are_whole() -> None:
    for count in (12, 1032, 1000000):
        expected = "devices; expected at most 8, or a multiple of 8 up to 1024"
        with pytest.raises(ValueError, match=f"'h100x{count}' has {count} {expected}"):
            targets.parse_topology(f"h100x{count}")


def test_lookups() -> None:
    assert targets.find("a100").capability == (8, 0)
    with pytest.raises(ValueError, match="'h10'; expected one of: a100, h100, h200, b200"):
        targets.find("h10")
    for target in targets.TARGETS:
        assert targets.of_kind(target.kind) is target
        assert target.device == targets.Device("cuda", target.kind, target.capability)
    assert targets.of_kind("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_architectures() -> None:
    assert [target.arch for target in targets.TARGETS] == ["sm_80", "sm_90a", "sm_90a", "sm_100a"]


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    h100, h200 = targets.find("h100"), targets.find("h200")
    assert h100.roofline(989e12, 0) == h200.roofline(989e12, 0) == 1
    assert h100.roofline(989e9, 3.35232e12) == 1
    assert h200.roofline(0, 4.8e9) == pytest.approx(1e-3)


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_matrix_rates_follow_from_the_tensor_cores(target: targets.Target) -> None:
    """Multiply-adds per cycle of all tensor cores, at a clock that is at most the highest."""
    multiply_adds = {8: 256, 9: 512, 10: 1024}[target.capability[0]] * 4  # of a multiprocessor
    clock = target.matmul_rate / (2 * multiply_adds * target.sms)
    print(f"{target.name}: {clock / 1e9:.3f} GHz of {target.clock / 1e9} GHz")
    assert 0.85 * target.clock < clock <= 1.001 * target.clock


def test_configurations_state_the_device() -> None:
    config = targets.find("h200").config()
    for line in (r"core_count: 132\b", r"memory_bandwidth: 4800000000000\b"):
        assert re.search(line, config)
    assert re.search(r"clock_rate_ghz: 1\.98\b", config)
    assert re.search(r"shared_memory_per_block_optin: 232448\b", config)
    assert 'device_description_str: "NVIDIA H200"' in config
    assert config.count("{") == config.count("}")


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "has_plugin", lambda: False)
    install = r"CUDA plugin.*; run: pip install 'sngpt-jax\[cuda13\]'$"
    with pytest.raises(targets.MissingToolchain, match=install):
        targets.prepare()


COMPILE = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from sngpt_jax.ahead import targets
from sngpt_jax.cluster.mesh import make_mesh

targets.prepare()
assert len(jax.devices()) == 1 and jax.devices()[0].platform == "cpu"
for target in targets.TARGETS:
    mesh = make_mesh(targets.devices(target, 16), fsdp=8)
    device = mesh.devices[1, 7]
    assert device.device_kind == target.kind and device.process_index == 1
    sharding = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)
    compiled = jax.jit(jnp.tanh).lower(x).compile(compiler_options=targets.COMPILER_OPTIONS)
    print(target.name, compiled.memory_analysis().argument_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not targets.has_plugin(), reason=f"needs the plugin: {targets.INSTALL}")
def test_compiles_for_every_target() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        f"{target.name} {64 * 64 * 4 // 16}" for target in targets.TARGETS
    ]
