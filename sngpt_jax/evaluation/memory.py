"""Whether a scoring step fits into the device's memory, known before it runs."""

from typing import Any

import jax
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.model.forward import Batch, Variables
from sngpt_jax.run.meter import device_memory


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
