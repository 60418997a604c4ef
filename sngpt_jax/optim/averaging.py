"""Averages of the weights: an exponential moving average (EMA) and a mean of snapshots (SWA).

Sources: EMA, Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992);
SWA, Izmailov et al., "Averaging weights leads to wider optima and better generalization"
(https://arxiv.org/abs/1803.05407).

An average has the tree of the parameters and is float32, except that embedding tables (groups embed
and table) are kept in `average_table_dtype`. In bfloat16, as some published runs had it, an entry
moves only if an update exceeds about 1/256 of it. All arithmetic is float32.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import state_shardings
from sngpt_jax.config import OptimConfig
from sngpt_jax.optim.groups import label


def _dtypes(config: OptimConfig, params: optax.Params) -> optax.Params:
    dtypes = {"embed": config.average_table_dtype, "table": config.average_table_dtype}
    return jax.tree.map(lambda group: jnp.dtype(dtypes.get(group, "float32")), label(params))


def init_ema(config: OptimConfig, params: optax.Params) -> optax.Params:
    """The moving average before the first step: a copy of the initial weights."""
    return jax.tree.map(lambda p, dtype: jnp.array(p, dtype), params, _dtypes(config, params))


def update_ema(ema: optax.Params, params: optax.Params, decay: float) -> optax.Params:
    """decay · ema + (1 - decay) · params, of the `params` after the step."""

    def update(e: jax.Array, p: jax.Array) -> jax.Array:
        return (decay * e.astype(jnp.float32) + (1.0 - decay) * p).astype(e.dtype)

    return jax.tree.map(update, ema, params)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SWA:
    """The mean of the snapshots so far."""

    count: jax.Array  # int32 scalar: snapshots in the mean
    mean: optax.Params  # zeros before the first snapshot


def init_swa(config: OptimConfig, params: optax.Params) -> SWA:
    """The mean before the first snapshot."""
    mean = jax.tree.map(lambda p, dtype: jnp.zeros(p.shape, dtype), params, _dtypes(config, params))
    return SWA(count=jnp.zeros((), jnp.int32), mean=mean)


def update_swa(swa: SWA, params: optax.Params, take: jax.typing.ArrayLike) -> SWA:
    """`swa` with the snapshot `params` added if the boolean scalar `take` is true.

    Both results are computed and one is selected, because a GPU would wait for the predicate of a
    `lax.cond`.
    """
    count = swa.count + jnp.asarray(take, jnp.int32)

    def update(mean: jax.Array, p: jax.Array) -> jax.Array:
        before = mean.astype(jnp.float32)
        after = before + (p - before) / jnp.maximum(count, 1)  # count is 0 only if none is taken
        return jnp.where(take, after.astype(mean.dtype), mean)

    return SWA(count=count, mean=jax.tree.map(update, swa.mean, params))


def averaged_weights(average: optax.Params | SWA, mesh: Mesh) -> optax.Params:
    """The weights of an EMA or an `SWA`, float32, laid out over `mesh` as the model's."""
    mean = average.mean if isinstance(average, SWA) else average
    as_float32 = functools.partial(optax.tree.cast, dtype=jnp.float32)
    return jax.jit(as_float32, out_shardings=state_shardings(mesh, mean))(mean)
