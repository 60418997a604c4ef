"""One optimizer step and one evaluation batch, as pure functions of arrays. Knows no files and no clock."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.model.gpt import GPT
from sngpt_jax.optim import averaging, qat
from sngpt_jax.optim.averaging import SWA
from sngpt_jax.optim.groups import clip, make_optimizer
from sngpt_jax.optim.schedules import StepControls
from sngpt_jax.parallel import BATCH_AXES, state_shardings

Params = dict[str, Any]  # nested dicts of float32 arrays, by the model's attribute names
Batch = dict[str, jax.Array]  # "inputs" and "targets", token ids
Metrics = dict[str, jax.Array]


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


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """The initial parameters that `key` draws. Under `jax.eval_shape` their shapes alone."""
    return nnx.to_pure_dict(nnx.state(GPT(config, rngs=nnx.Rngs(params=key)), nnx.Param))


@functools.cache
def forward(config: ModelConfig) -> Callable[[Params, jax.Array], jax.Array]:
    """The pure function (params, tokens [B, T]) → logits [B, T, V] of the model that `config` describes."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(params=jax.random.key(0)))))
    return lambda params, tokens_BT: nnx.merge(graph, params)(tokens_BT)


@functools.cache
def losses(config: ModelConfig) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """The pure function (params, inputs [B, T], targets [B, T]) → cross-entropy in nats [B, T], float32."""
    apply = forward(config)

    def token_losses(params: Params, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        chex.assert_equal_shape((inputs_BT, targets_BT))
        logits_BTV = apply(params, inputs_BT.astype(jnp.int32))
        return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT.astype(jnp.int32))

    return token_losses


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
    )


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """The state before the first step, each array born on the devices that keep it."""

    def init() -> TrainState:
        return begin(config, init_params(config.model, jax.random.fold_in(jax.random.key(config.train.seed), 0)))

    return jax.jit(init, out_shardings=state_shardings(mesh, jax.eval_shape(init)))()


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, with nothing computed: what a restore aims at."""
    shapes = jax.eval_shape(lambda: init_state(config, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step (state, batch [A, B/A, T], controls) → (state, {"loss", "grad_norm"}).

    The loss is the mean over the batch in nats a token; the gradient its exact mean over A microbatches and all devices.
    Each device accumulates its own microbatches and the devices reduce once, after the last: a scan around a global
    gradient would reduce in every turn. `controls` are what the host decides for the step; they are traced, so that a
    schedule driven by the clock compiles once. The state passed in is donated.
    """
    o = config.optim

    def loss_fn(params: Params, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return jnp.mean(losses(config.model)(params, inputs_BT, targets_BT))

    def local_mean(params: Params, inputs_ABT: jax.Array, targets_ABT: jax.Array) -> tuple[jax.Array, Params]:
        def microbatch(total: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, *batch)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(microbatch, zero, (inputs_ABT, targets_ABT))
        loss, grads = jax.tree.map(lambda x: x / inputs_ABT.shape[0], total)
        if o.grad_clip_scope == "device":
            grads = clip(grads, o.grad_clip)
        return jax.lax.pmean((loss, grads), BATCH_AXES)

    rows = P(None, BATCH_AXES)
    # check_vma would insert a reduction into every microbatch's gradient, since the parameters are the same everywhere
    global_mean = jax.shard_map(local_mean, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(), check_vma=False)

    def train_step(state: TrainState, batch: Batch, controls: StepControls) -> tuple[TrainState, Metrics]:
        params = state.params
        if o.qat_below:
            # outside of the differentiated function, once a step: the gradient passes through the rounding as it is
            params = qat.straight_through(params, config.export, controls.qat)
        with jax.named_scope("gradient"):
            loss, grads = global_mean(params, batch["inputs"], batch["targets"])
        with jax.named_scope("optimizer"):
            optimizer = make_optimizer(o, state.params)
            multiplier = controls.lr_multiplier
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, lr_multiplier=multiplier)
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("averages"):
            ema = averaging.update_ema(state.ema, params, o.ema_decay) if state.ema is not None else None
            swa = averaging.update_swa(state.swa, params, controls.swa) if state.swa is not None else None
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, state.key, ema, swa), metrics

    # the state comes back laid out as it went in, so that the compiled step can be called on its own result
    layout = state_shardings(mesh, jax.eval_shape(lambda: init_state(config, mesh)))
    return jax.jit(train_step, donate_argnums=0, out_shardings=(layout, NamedSharding(mesh, P())))


def make_eval_step(config: ModelConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted function (params, batch [B, T]) → summed loss in nats of each row [B], float32, known to every process."""

    def row_sums(params: Params, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        local = jnp.sum(losses(config)(params, inputs_BT, targets_BT), axis=-1)
        return jax.lax.all_gather(local, BATCH_AXES, tiled=True)

    rows = P(BATCH_AXES)
    sums = jax.shard_map(row_sums, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(), check_vma=False)
    return jax.jit(lambda params, batch: sums(params, batch["inputs"], batch["targets"]))


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every number in `params` is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
