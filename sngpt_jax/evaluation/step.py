"""One batch of a stream, scored: a pure function of the model's variables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.cluster.mesh import BATCH_AXES, gather, partition_specs
from sngpt_jax.config import ModelConfig
from sngpt_jax.model import loss
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, graph

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
