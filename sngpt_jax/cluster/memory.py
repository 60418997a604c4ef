"""Programs that are compared with the device's memory before they run."""

from typing import Any

import jax
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.memory import host_memory, shown
from sngpt_jax.cluster import processes


def device_memory(device: jax.Device) -> int:
    """The bytes that arrays may take on the device: jax's share of a GPU; on a CPU, the device's
    share of what the machine has left.
    """
    if stats := device.memory_stats():
        return int(stats["bytes_limit"])
    return host_memory() // len(device.client.local_devices())


def limit_of(mesh: Mesh) -> int:
    """Process 0's `device_memory`: all processes decide alike."""
    return processes.broadcast(lambda: device_memory(mesh.local_devices[0]))


def _left(mesh: Mesh) -> int:
    """The part of `limit_of` that no array takes now."""

    def left() -> int:
        device = mesh.local_devices[0]
        jax.block_until_ready(jax.live_arrays())  # a running program's temporaries are freed soon
        return device_memory(device) - (device.memory_stats() or {}).get("bytes_in_use", 0)

    return processes.broadcast(left)


class Fitted:
    """A jitted function of (variables, batch, …), which scores or continues rows of text. The batch
    is a tree of arrays [rows, …]. For each new shape of its batch the function is compiled, and
    compared with the device's memory, before it runs.
    """

    def __init__(
        self, step: jax.stages.Wrapped, mesh: Mesh, doing: str, row_tokens: int | None = None
    ) -> None:
        """`doing` names the work in messages. A row counts as `row_tokens` of
        `eval.device_batch_tokens`; default: as its inputs.
        """
        self._step, self._mesh, self._doing, self._row_tokens = step, mesh, doing, row_tokens
        self._programs: dict[Any, Any] = {}

    def __call__(self, variables: Any, batch: Any, *rest: Any) -> Any:
        return self.compiled(variables, batch, *rest)(variables, batch, *rest)

    def compiled(self, variables: Any, batch: Any, *rest: Any, left: int | None = None) -> Any:
        """The program for arguments like these; the variables may be abstract.

        Raises `UserError` if it needs more than the device has left, or more than `left` bytes; the
        message names what fits.
        """
        leaves, structure = jax.tree.flatten((batch, rest))
        layout = (getattr(x, "sharding", None) for x in jax.tree.leaves(variables))
        key = structure, *((x.shape, x.dtype) for x in leaves), *layout
        if key not in self._programs:
            self._programs[key] = self._compile(variables, batch, rest, left)
        return self._programs[key]

    def _compile(self, variables: Any, batch: Any, rest: Any, left: int | None) -> Any:
        devices = self._mesh.devices.size
        rows = len(jax.tree.leaves(batch)[0])

        def compiled_for(rows: int) -> tuple[Any, int]:
            """The program for so many rows, and the bytes that it takes beside its arguments."""
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding),
                batch,
            )
            compiled: Any = self._step.lower(variables, like, *rest).compile()
            memory = compiled.memory_analysis()
            new = memory.output_size_in_bytes - memory.alias_size_in_bytes  # of the outputs
            return compiled, memory.temp_size_in_bytes + new

        left = _left(self._mesh) if left is None else left
        compiled, need = compiled_for(rows)
        if need <= left:
            return compiled
        less, share = need, rows // devices
        while less > left and (share := share // 2):
            _, less = compiled_for(share * devices)
        remedy = "not even one text at a time fits; take shorter texts or more memory"
        if share:
            tokens = share * (self._row_tokens or batch["inputs"].shape[1])
            remedy = f"--eval.device-batch-tokens {tokens} needs {shown(less)} and fits"
        raise UserError(
            f"{self._doing} needs {shown(need)} and the device has {shown(left)} left; {remedy}"
        )
