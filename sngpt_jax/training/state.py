"""What a training step changes: parameters, optimizer state, averages; where each array of it
lies.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import ALL_AXES, PARAMETER_AXES, state_shardings
from sngpt_jax.config import Config
from sngpt_jax.model.forward import Params, Variables, init_params, init_statistics, join
from sngpt_jax.optim import averaging, skipping
from sngpt_jax.optim.averaging import SWA
from sngpt_jax.optim.groups import make_optimizer
from sngpt_jax.optim.skipping import Skips


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; what a checkpoint holds."""

    step: jax.Array  # int32 scalar: optimizer steps done
    params: Params
    opt_state: Any
    key: jax.Array  # typed key that the run's randomness is folded from; the same all along
    ema: Params | None = None  # exponential moving average of params, where the recipe keeps one
    swa: SWA | None = None  # mean of snapshots of params, where the recipe keeps one
    # of the sparse codes, where the model has them
    statistics: Params = field(default_factory=dict)
    skips: Skips | None = None  # steps that changed nothing, where the recipe skips any

    def variables(self, params: Params | None = None) -> Variables:
        """What the model computes with: the statistics and the parameters, or other `params` in
        their place.
        """
        return join(self.params if params is None else params, self.statistics)


def begin(config: Config, params: Params) -> TrainState:
    """The state before the first step of a run that starts from `params`."""
    o = config.optim
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(o, params).init(params),
        key=jax.random.key(config.train.seed),
        ema=averaging.init_ema(o, params) if o.ema_decay else None,
        swa=averaging.init_swa(o, params) if o.swa_every else None,
        statistics=init_statistics(config.model),
        skips=skipping.init_skips(config.train),
    )


def kept_over(config: Config) -> tuple[str, ...]:
    """The mesh's axes over which gradients, optimizer state and averages are split."""
    return ALL_AXES if config.train.shard_optimizer else PARAMETER_AXES


def shardings(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of a training state lies, in the state's tree; `state` may be abstract."""
    kept = {name: getattr(state, name) for name in ("opt_state", "ema", "swa")}
    return replace(state_shardings(mesh, state), **state_shardings(mesh, kept, kept_over(config)))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """The state before the first step, each array born on the devices that keep it."""

    def init() -> TrainState:
        return begin(
            config,
            init_params(config.model, jax.random.fold_in(jax.random.key(config.train.seed), 0)),
        )

    return jax.jit(init, out_shardings=shardings(config, mesh, jax.eval_shape(init)))()


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, with nothing computed: what a restore aims at."""
    shapes = jax.eval_shape(lambda: init_state(config, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(config, mesh, shapes),
    )
