"""Descriptions of GPUs that this machine need not have, to compile for and to compute limits.

A program is compiled for a target through its `devices`, which hold no memory and run nothing,
after `prepare`, inside `tracing` and with `COMPILER_OPTIONS`.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh
from sngpt_kernels.dispatch import Device, targeting

from sngpt_jax.run.meter import peak_flops

MOST_DEVICES = 1024
HOST_DEVICES = 8  # GPUs per machine on the boards of these devices

# Autotuning would time algorithms on the device, which is absent.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}

INSTALL = "pip install 'sngpt-jax[cuda13]'"


class MissingToolchain(RuntimeError):
    """The compiler for GPUs is not installed. The message says what to install."""


@dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler sees it, with the rates of xla/backends/gpu/target_config/specs."""

    name: str  # in topologies: h100
    kind: str  # jax's name of the device
    capability: tuple[int, int]  # CUDA compute capability
    bandwidth: float  # bytes/s of the device's memory
    link: float  # bytes/s to the other devices of the machine, one way (NVLink)
    memory: int  # bytes
    clock: float  # Hz, at most
    sms: int  # streaming multiprocessors
    lanes: int  # float32 operations that a multiprocessor starts per cycle
    l2: int  # bytes
    shared_memory: int  # bytes per multiprocessor

    @property
    def matmul_rate(self) -> float:
        """FLOP/s of dense bfloat16 matrix products, two per multiply-add."""
        return peak_flops(self.kind) or math.nan

    @property
    def device(self) -> Device:
        """The device for `dispatch.targeting`."""
        return Device("cuda", self.kind, self.capability)

    @property
    def arch(self) -> str:
        """The name in ptxas, with the extensions of the architecture."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + "a" * (major >= 9)

    def roofline(self, matmul_flops: float, moved: float) -> float:
        """The least seconds for so many FLOPs on tensor cores beside so many bytes of traffic."""
        return max(matmul_flops / self.matmul_rate, moved / self.bandwidth)

    def config(self) -> str:
        """The device as a GpuTargetConfigProto of XLA, in text form."""
        major, minor = self.capability
        extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {self.sms} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock / 1e9}
  memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory} l2_cache_size: {self.l2}
  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block_optin: {self.shared_memory - 2**10} shared_memory_per_block: 49152
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.kind}"
"""


_H100 = Target(
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    bandwidth=3.35232e12,
    link=450e9,
    memory=84_942_979_072,
    clock=1.98e9,
    sms=132,
    lanes=128,
    l2=50 * 2**20,
    shared_memory=228 * 2**10,
)
_A100 = Target(
    name="a100",
    kind="NVIDIA A100-SXM4-80GB",
    capability=(8, 0),
    bandwidth=2.03904e12,
    link=300e9,
    memory=85_100_068_864,
    clock=1.41e9,
    sms=108,
    lanes=64,
    l2=40 * 2**20,
    shared_memory=164 * 2**10,
)
_H200 = replace(_H100, name="h200", kind="NVIDIA H200", bandwidth=4.8e12, memory=151_397_597_184)
_B200 = replace(
    _H100,
    name="b200",
    kind="NVIDIA B200",
    capability=(10, 0),
    bandwidth=7.67232e12,
    link=900e9,
    memory=191_514_411_008,
    clock=1.965e9,
    sms=148,
    l2=132_644_864,
)
TARGETS = (_A100, _H100, _H200, _B200)
_BY_NAME = {target.name: target for target in TARGETS}
_NAMES = ", ".join(_BY_NAME)


def find(name: str) -> Target:
    """The target of that name, such as h100. Raises ValueError if there is none."""
    if name not in _BY_NAME:
        raise ValueError(f"target is {name!r}; expected one of: {_NAMES}")
    return _BY_NAME[name]


def of_kind(kind: str) -> Target | None:
    """The target that jax names `kind`; None for other devices, such as a slice of a GPU."""
    return next((target for target in TARGETS if target.kind == kind), None)


def parse_topology(text: str) -> tuple[Target, int]:
    """(device, number) of a topology such as h100x8. More than 8 devices fill machines of 8.

    Raises ValueError for another form, device or number.
    """
    match = re.fullmatch(r"([a-z]+\d+)x([1-9]\d*)", text)
    if match is None or match[1] not in _BY_NAME:
        expected = f"DEVICExNUMBER, such as h100x8, with a DEVICE of: {_NAMES}"
        raise ValueError(f"{text!r} is no topology; expected {expected}")
    count = int(match[2])
    if count > MOST_DEVICES or (count > HOST_DEVICES and count % HOST_DEVICES):
        allowed = f"at most {HOST_DEVICES}, or a multiple of {HOST_DEVICES} up to {MOST_DEVICES}"
        raise ValueError(f"{text!r} has {count} devices; expected {allowed}")
    return _BY_NAME[match[1]], count


def has_plugin() -> bool:
    """Whether jax's CUDA plugin is installed."""
    find, plugins = importlib.util.find_spec, ("xla_cuda13", "xla_cuda12")
    return bool(find("jax_plugins")) and any(find(f"jax_plugins.{name}") for name in plugins)


def prepare() -> None:
    """Prepares this process to compile for absent devices and to run on the host's processor.

    Call it before jax touches a device. Raises MissingToolchain if jax has no CUDA plugin.
    """
    if not has_plugin():
        needs = "compiling for a GPU needs jax's CUDA plugin, even without a GPU here"
        raise MissingToolchain(f"{needs}; run: {INSTALL}")
    # Without it the plugin would not load where there is no driver.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    jax.config.update("jax_platforms", "cpu")


def devices(target: Target, count: int = 1) -> list[jax.Device]:
    """`count` devices to compile for, after `prepare`. They cannot hold arrays."""
    hosts = max(1, count // HOST_DEVICES)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target.config(), topology=f"1x{hosts}x{count // hosts}"
    )
    return list(topology.devices)


@contextlib.contextmanager
def tracing(target: Target) -> Iterator[None]:
    """Inside, code is traced and lowered for the target, by `dispatch` and by jax itself."""
    device = AbstractDevice(device_kind=target.kind, num_cores=target.sms, platform="gpu")
    with (
        targeting(target.device),
        jax.default_device(devices(target)[0]),  # which tokamax asks
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)),
    ):
        yield
