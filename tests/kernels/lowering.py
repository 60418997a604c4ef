"""The kernels in the program of a value and its gradients, lowered for 8 GPUs."""

import re
from collections import Counter

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import Device

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))


def kernels_of_gradients(loss, argnums, arguments, axes=2):
    """How often each kernel occurs. Arguments with so many axes or more are sharded."""
    gpu = AbstractDevice(device_kind=H100.kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,), abstract_device=gpu)

    def step(*arguments):
        value, gradients = jax.value_and_grad(loss, argnums)(*arguments)
        return value[None], *gradients

    rows = PartitionSpec("data")
    in_specs = tuple(rows if len(array.shape) >= axes else PartitionSpec() for array in arguments)
    sharded = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=rows, check_vma=False)
    with dispatch.targeting(H100):
        lowered = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("cuda",))
    kernels = r'name = "((?:cayley|epilogue|mlp|rotary|stream|xsa)_\w+)"'
    return Counter(re.findall(kernels, lowered.as_text()))
