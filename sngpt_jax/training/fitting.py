"""Whether a training step fits the device's memory, by the compiled program's own analysis."""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.memory import shown
from sngpt_jax.cluster.memory import Fitted, limit_of
from sngpt_jax.cluster.mesh import BATCH_AXES, batch_placer
from sngpt_jax.config import changed, microbatches
from sngpt_jax.data.shards import TokenStream
from sngpt_jax.evaluation.windows import rows_at_a_time, standard_windows, window_batches
from sngpt_jax.optim.schedules import step_controls
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
    limit = limit_of(shapes.mesh)
    tokens, need = _largest(shapes, need_of(shapes), limit)
    logger.info(
        f"train.device_batch_tokens = {tokens}: the step needs {shown(need.total)} of"
        f" {shown(limit)}"
    )
    return _with_tokens(shapes, tokens)


def check(shapes: Shapes, compiled: Any) -> None:
    """Raises `UserError` if the compiled step does not fit; it names the microbatch that does."""
    need, limit = _need(shapes, compiled), limit_of(shapes.mesh)
    if need.total > limit:
        tokens, less = _largest(shapes, need, limit)
        raise UserError(
            f"the step needs {shown(need.total)} and the device has {shown(limit)};"
            f" --train.device-batch-tokens {tokens} needs {shown(less.total)} and fits"
        )


def check_validation(shapes: Shapes, compiled: Any, scoring: Fitted, stream: TokenStream) -> None:
    """Raises `UserError` if `scoring` the run's validation text does not fit beside the state of
    the `compiled` step and the averages of the weights.
    """
    config, mesh = shapes.config, shapes.mesh
    windows = standard_windows(len(stream), config.data.seq_len, config.eval.tokens)
    rows = rows_at_a_time(windows, config.eval.device_batch_tokens, mesh.devices.size)
    batch = batch_placer(mesh)(next(window_batches(stream, windows, rows)).arrays)
    copies = (shapes.state.swa is not None) + (shapes.state.ema is not None)
    variables = shapes.state.variables()
    averages = copies * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(variables)
    )
    state = compiled.memory_analysis().argument_size_in_bytes
    scoring.compiled(variables, batch, left=limit_of(mesh) - state - averages)


def _largest(shapes: Shapes, need: Need, limit: int) -> tuple[int, Need]:
    """Tokens of the largest microbatch that fits, and what it needs; `need` is that of `shapes`."""
    first, seq_len = need, shapes.config.data.seq_len
    room = limit - limit // 16  # arrays lie with gaps, and a machine's free memory varies
    while need.total > room:
        sequences = fewer(need, room, _tokens(shapes) // seq_len)
        if not sequences:
            raise UserError(
                f"the step needs {shown(first.total)} and the device has {shown(limit)}; not even"
                " one sequence per microbatch fits; set --train.fsdp, add devices, or choose a"
                " smaller model or data.seq_len"
            )
        shapes = _with_tokens(shapes, sequences * seq_len)
        need = need_of(shapes)
    return _tokens(shapes), need


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
