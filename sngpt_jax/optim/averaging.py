"""Averages of the weights that a run keeps beside them: an exponential moving one (EMA) and a
plain mean of snapshots (SWA).

Sources: EMA, Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992);
SWA, Izmailov et al., "Averaging weights leads to wider optima and better generalization"
(https://arxiv.org/abs/1803.05407).

An average has the tree of the parameters, whatever they are. It is float32, and the embedding
tables in it (groups embed and table) are in `average_table_dtype`. bfloat16 there is what some
published runs did and costs accuracy: a table's entry moves only where an update exceeds its last
bit, 1/256 of it or so. All arithmetic is float32; only what is kept is rounded.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import path_name, state_shardings
from sngpt_jax.config import OptimConfig
from sngpt_jax.optim.groups import group_of


def _dtypes(config: OptimConfig, params: optax.Params) -> optax.Params:
    """The dtype of each leaf of an average of `params`."""

    def dtype(path: tuple[object, ...], _: jax.Array) -> jnp.dtype:
        is_table = group_of(path_name(path)) in ("embed", "table")
        return jnp.dtype(config.average_table_dtype if is_table else "float32")

    return jax.tree_util.tree_map_with_path(dtype, params)


def init_ema(config: OptimConfig, params: optax.Params) -> optax.Params:
    """The moving average before the first step: a copy of the initial weights."""
    return jax.tree.map(lambda p, dtype: jnp.array(p, dtype), params, _dtypes(config, params))


def update_ema(ema: optax.Params, params: optax.Params, decay: float) -> optax.Params:
    """decay · ema + (1 - decay) · params, where `params` are the weights after the step."""

    def update(e: jax.Array, p: jax.Array) -> jax.Array:
        return (decay * e.astype(jnp.float32) + (1.0 - decay) * p).astype(e.dtype)

    return jax.tree.map(update, ema, params)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SWA:
    """The mean of the snapshots so far."""

    count: jax.Array  # int32 scalar: snapshots in the mean
    mean: optax.Params  # zeros as long as there is none


def init_swa(config: OptimConfig, params: optax.Params) -> SWA:
    """The mean of no snapshot yet."""
    mean = jax.tree.map(lambda p, dtype: jnp.zeros(p.shape, dtype), params, _dtypes(config, params))
    return SWA(count=jnp.zeros((), jnp.int32), mean=mean)


def update_swa(swa: SWA, params: optax.Params, take: jax.typing.ArrayLike) -> SWA:
    """`swa` with the snapshot `params` in its mean where the boolean scalar `take` is true, else
    as it was, to the last bit.

    `take` may be traced. Both answers are computed and one is selected: a `lax.cond` would have a
    GPU wait for its predicate.
    """
    count = swa.count + jnp.asarray(take, jnp.int32)

    def update(mean: jax.Array, p: jax.Array) -> jax.Array:
        before = mean.astype(jnp.float32)
        # count is 0 only where nothing is taken
        after = before + (p - before) / jnp.maximum(count, 1)
        return jnp.where(take, after.astype(mean.dtype), mean)

    return SWA(count=count, mean=jax.tree.map(update, swa.mean, params))


def averaged_weights(average: optax.Params | SWA, mesh: Mesh) -> optax.Params:
    """The weights that an EMA or the mean of an `SWA` stands for, float32 and laid out over `mesh`
    as the model's own.
    """
    mean = average.mean if isinstance(average, SWA) else average
    as_float32 = functools.partial(optax.tree.cast, dtype=jnp.float32)
    return jax.jit(as_float32, out_shardings=state_shardings(mesh, mean))(mean)
