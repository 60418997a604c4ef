"""Whether a training step fits the device's memory, by the compiled program's own analysis."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.mesh import BATCH_AXES
from sngpt_jax.config import changed, microbatches
from sngpt_jax.optim.schedules import step_controls
from sngpt_jax.run import meter
from sngpt_jax.training import compiler, trust
from sngpt_jax.training.state import Shapes
from sngpt_jax.training.step import make_train_step

logger = logging.getLogger("sngpt_jax")


@dataclass(frozen=True)
class Need:
    """Bytes of one device's memory."""

    fixed: int  # the state and the batch, and results that are not written over them
    temporaries: int

    @property
    def total(self) -> int:
        return self.fixed + self.temporaries


def fewer(need: Need, limit: int, sequences: int) -> int:
    """How many sequences per microbatch to try after `sequences`, which exceed `limit` bytes.

    Temporaries grow like the microbatch, within an eighth. Not even one sequence fits if the result
    is 0.
    """
    room = limit - need.fixed
    at_most = 9 * sequences * room // (8 * need.temporaries) + 1
    return min(sequences - 1, at_most) if room > 0 else 0


def accumulation_of(shapes: Shapes) -> int:
    """The microbatches of a step. Raises `ConfigError` as `config.microbatches` does."""
    data, train = shapes.config.data, shapes.config.train
    devices = shapes.mesh.devices.size
    return microbatches(data.batch_tokens, train.device_batch_tokens, data.seq_len, devices)


def resolved(shapes: Shapes, kernels: trust.Mode) -> Shapes:
    """`shapes`, where an automatic `train.device_batch_tokens` becomes the largest that fits.

    `kernels` says which custom kernels may run. Raises `UserError` if not even one sequence fits.
    """
    if shapes.config.train.device_batch_tokens:
        return shapes
    logger.info("train.device_batch_tokens: compiling the step for the microbatch that fits")
    trust.settle(shapes.config, _tokens(shapes), kernels)
    limit = _limit(shapes.mesh)
    tokens, need = _largest(shapes, need_of(shapes), limit)
    logger.info(
        f"train.device_batch_tokens = {tokens}: the step needs {_shown(need.total)} of"
        f" {_shown(limit)}"
    )
    return _with_tokens(shapes, tokens)


def check(shapes: Shapes, compiled: Any) -> None:
    """Raises `UserError` if the compiled step does not fit; it names the microbatch that does."""
    need, limit = _need(shapes, compiled), _limit(shapes.mesh)
    if need.total > limit:
        tokens, less = _largest(shapes, need, limit)
        raise UserError(
            f"the step needs {_shown(need.total)} and the device has {_shown(limit)};"
            f" --train.device-batch-tokens {tokens} needs {_shown(less.total)} and fits"
        )


def _largest(shapes: Shapes, need: Need, limit: int) -> tuple[int, Need]:
    """Tokens of the largest microbatch that fits, and what it needs; `need` is that of `shapes`."""
    first, seq_len = need, shapes.config.data.seq_len
    room = limit - limit // 16  # arrays lie with gaps, and a machine's free memory varies
    while need.total > room:
        sequences = fewer(need, room, _tokens(shapes) // seq_len)
        if not sequences:
            raise UserError(
                f"the step needs {_shown(first.total)} and the device has {_shown(limit)}; not even"
                " one sequence per microbatch fits; set --train.fsdp, add devices, or choose a"
                " smaller model or data.seq_len"
            )
        shapes = _with_tokens(shapes, sequences * seq_len)
        need = need_of(shapes)
    return _tokens(shapes), need


def _limit(mesh: Mesh) -> int:
    """Process 0's bytes per device: all processes decide alike."""
    return processes.broadcast(lambda: meter.device_memory(mesh.local_devices[0]))


def _need(shapes: Shapes, compiled: Any) -> Need:
    memory = compiled.memory_analysis()
    # a limited run's first call, before its clock starts, takes a copy of the state
    copies = 2 if shapes.config.train.max_seconds else 1
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Need(copies * memory.argument_size_in_bytes + results, memory.temp_size_in_bytes)


def _with_tokens(shapes: Shapes, tokens: int) -> Shapes:
    config = changed(shapes.config, train={"device_batch_tokens": tokens})
    return replace(shapes, config=config)


def _tokens(shapes: Shapes) -> int:
    """Of one device's microbatch."""
    return shapes.config.data.batch_tokens // shapes.mesh.devices.size // accumulation_of(shapes)


def need_of(shapes: Shapes) -> Need:
    """What the step of `shapes` needs, which is compiled for it."""
    config, accumulation = shapes.config, accumulation_of(shapes)
    data = config.data
    shape = (accumulation, data.batch_tokens // data.seq_len // accumulation, data.seq_len)
    rows = NamedSharding(shapes.mesh, P(None, BATCH_AXES))
    tokens = jax.ShapeDtypeStruct(shape, np.uint16, sharding=rows)
    batch = {"inputs": tokens, "targets": tokens}
    controls = step_controls(config.optim, config.train, 0, 0.0)
    lowered = make_train_step(shapes).lower(shapes.state, batch, controls)
    return _need(shapes, compiler.compile_step(lowered))


def _shown(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
