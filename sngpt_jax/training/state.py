"""What a training step changes: parameters, optimizer state and averages, and where they lie."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sngpt_jax.cluster.mesh import ALL_AXES, PARAMETER_AXES, state_shardings
from sngpt_jax.config import Config
from sngpt_jax.model.forward import Params, Variables, abstract_parts, init_variables, join
from sngpt_jax.optim import averaging, skipping
from sngpt_jax.optim.averaging import SWA
from sngpt_jax.optim.groups import make_optimizer
from sngpt_jax.optim.skipping import Skips


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. A checkpoint holds all of it."""

    step: jax.Array  # int32 scalar: optimizer steps done
    params: Params
    opt_state: Any
    key: jax.Array  # typed key from which the run's randomness is folded; it never changes
    ema: Params | None = None  # exponential moving average of params, if the recipe keeps one
    swa: SWA | None = None  # mean of snapshots of params, if the recipe takes any
    statistics: Params = field(default_factory=dict)  # of the sparse codes
    skips: Skips | None = None  # counts of skipped steps, if the recipe skips any

    def variables(self, params: Params | None = None) -> Variables:
        """The statistics joined with the parameters, or with other `params` in their place."""
        return join(self.params if params is None else params, self.statistics)


@dataclass(frozen=True)
class Shapes:
    """What follows from a recipe and a mesh before any array exists."""

    config: Config
    mesh: Mesh
    kept_over: tuple[str, ...]  # mesh axes that split gradients, optimizer state and averages
    optimizer: optax.GradientTransformationExtraArgs
    state: TrainState  # abstract arrays with their shardings

    @classmethod
    def of(cls, config: Config, mesh: Mesh) -> "Shapes":
        """Traces the initial state; computes nothing on a device."""
        kept_over = ALL_AXES if config.train.shard_optimizer else PARAMETER_AXES
        params, statistics = abstract_parts(config.model)
        optimizer = make_optimizer(config.optim, params, mesh, kept_over)
        state = jax.eval_shape(lambda *parts: _begin(config, optimizer, *parts), params, statistics)
        kept = {name: getattr(state, name) for name in ("opt_state", "ema", "swa")}
        shardings = replace(state_shardings(mesh, state), **state_shardings(mesh, kept, kept_over))
        state = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state, shardings)
        return cls(config, mesh, kept_over, optimizer, state)

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state)


def _begin(
    config: Config,
    optimizer: optax.GradientTransformationExtraArgs,
    params: Params,
    statistics: Params,
) -> TrainState:
    o = config.optim
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key(config.train.seed),
        ema=averaging.init_ema(o, params) if o.ema_decay else None,
        swa=averaging.init_swa(o, params) if o.swa_every else None,
        statistics=statistics,
        skips=skipping.init_skips(config.train),
    )


def init_state(shapes: Shapes, params: Params | None = None) -> TrainState:
    """The state before the first step, each array created on the devices that keep it.

    `params` replaces the random initial parameters.
    """
    config = shapes.config

    def init(params: Params | None) -> TrainState:
        key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
        drawn, statistics = init_variables(config.model, key)
        return _begin(config, shapes.optimizer, drawn if params is None else params, statistics)

    return jax.jit(init, out_shardings=shapes.shardings)(params)
