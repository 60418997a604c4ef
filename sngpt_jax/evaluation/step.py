"""One batch of a stream, scored: a pure function of the model's variables."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sngpt_jax.cluster.mesh import BATCH_AXES, gather, partition_specs
from sngpt_jax.config import ModelConfig
from sngpt_jax.model import loss
from sngpt_jax.model.forward import Batch, Variables, abstract_variables, graph


def make_eval_step(
    config: ModelConfig, mesh: Mesh, readings: tuple[str, ...] = ("nll",)
) -> jax.stages.Wrapped:
    """The jitted function (variables, batch) → the `readings` of `loss.token_readings` by name,
    [B, S], in all processes.

    The batch holds "inputs" [B, T] and "targets" [B, S] of S ≤ T consecutive positions. If S < T,
    "offsets" [B] give the first scored position of each row, and logits are computed for the
    scored positions only. "hints" [B, S] serve the reading hint_nll.
    """
    layout, rows = partition_specs(mesh, abstract_variables(config)), P(BATCH_AXES)

    def local(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph(config), gather(variables, layout))
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
        return {
            name: jax.lax.all_gather(value, BATCH_AXES, tiled=True) for name, value in found.items()
        }

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(layout, rows), out_specs=P(), check_vma=False)
    )
