"""One batch of a stream, scored: a pure function of the model's variables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.mesh import BATCH_AXES, gather, partition_specs
from sngpt_jax.config import ModelConfig
from sngpt_jax.model import loss
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, graph
from sngpt_jax.run.meter import device_memory

_EVERYWHERE = P()


def on_each_device(
    config: ModelConfig,
    mesh: Mesh,
    function: Callable[[Variables, Batch], Any],
    out_specs: P = _EVERYWHERE,
) -> jax.stages.Wrapped:
    """`function`, jitted, on each device with the whole variables and its rows of the batch."""
    layout = partition_specs(mesh, abstract_variables(config))

    def local(variables: Variables, batch: Batch) -> Any:
        return function(gather(variables, layout), batch)

    specs = layout, P(BATCH_AXES)
    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
    )


def compile_for(step: jax.stages.Wrapped, variables: Variables, batch: Batch, mesh: Mesh) -> Any:
    """`step`, compiled for batches like `batch`.

    Raises `UserError` if it needs more memory than the device has left; it names what fits.
    """
    rows, length = batch["inputs"].shape

    def left_now() -> int:
        device = mesh.local_devices[0]
        return device_memory(device) - (device.memory_stats() or {}).get("bytes_in_use", 0)

    def compiled_for(rows: int) -> tuple[Any, int]:
        """The program for so many rows, and the bytes that it takes beside its arguments."""
        like = {
            name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding)
            for name, x in batch.items()
        }
        compiled: Any = step.lower(variables, like).compile()
        memory = compiled.memory_analysis()
        return compiled, memory.temp_size_in_bytes + memory.output_size_in_bytes

    left = processes.broadcast(left_now)
    compiled, need = compiled_for(rows)
    if need <= left:
        return compiled
    less, share = need, rows // mesh.devices.size
    while less > left and (share := share // 2):
        _, less = compiled_for(share * mesh.devices.size)
    remedy = "not even one sequence at a time fits; choose a device with more memory"
    if share:
        tokens = share * length
        remedy = f"--eval.device-batch-tokens {tokens} needs {less / 2**30:.3g} GiB and fits"
    raise UserError(
        f"scoring needs {need / 2**30:.3g} GiB and the device has {left / 2**30:.3g} GiB left"
        f"; {remedy}"
    )


def make_eval_step(
    config: ModelConfig, mesh: Mesh, readings: tuple[str, ...] = ("nll",)
) -> jax.stages.Wrapped:
    """The jitted function (variables, batch) → the `readings` of `loss.token_readings` by name,
    [B, S], in all processes.

    The batch holds "inputs" [B, T] and "targets" [B, S] of S ≤ T consecutive positions. If S < T,
    "offsets" [B] give each row's first scored position. "hints" [B, S] serve the reading hint_nll.
    """

    def local(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph(config), variables)
        targets_BS = batch["targets"].astype(jnp.int32)
        x_BTD = model.hidden(batch["inputs"].astype(jnp.int32))
        if "offsets" in batch:
            S = targets_BS.shape[1]
            x_BTD = jax.vmap(lambda x_TD, offset: jax.lax.dynamic_slice_in_dim(x_TD, offset, S))(
                x_BTD, batch["offsets"]
            )
        with jax.named_scope("head"):
            found = loss.token_readings(
                x_BTD,
                model.embed.table[...],
                targets_BS,
                batch.get("hints", targets_BS),
                readings,
                cap=config.logit_soft_cap,
                chunk=config.logit_chunk,
            )
        return {name: jax.lax.all_gather(x, BATCH_AXES, tiled=True) for name, x in found.items()}

    return on_each_device(config, mesh, local)
