"""One optimizer step and one evaluation batch, as pure functions of arrays. Knows no files and no clock."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.dispatch import Device, current_device, targeting
from sngpt_jax import compiler
from sngpt_jax.config import Config, ModelConfig
from sngpt_jax.model import cayley, loss
from sngpt_jax.model.cayley import Statistic, Taps
from sngpt_jax.model.gpt import GPT
from sngpt_jax.model.pre_norm import PreNormGPT
from sngpt_jax.optim import averaging, qat, skipping
from sngpt_jax.optim.averaging import SWA
from sngpt_jax.optim.groups import clip, make_optimizer
from sngpt_jax.optim.schedules import StepControls
from sngpt_jax.optim.skipping import Skips
from sngpt_jax.parallel import ALL_AXES, BATCH_AXES, PARAMETER_AXES, gather, partition_specs, reduce_mean, state_shardings

Params = dict[str, Any]  # nested dicts of float32 arrays, by the model's attribute names
Variables = dict[str, Any]  # the same with the statistics of sparse codes in their places: all that a model computes with
Batch = dict[str, jax.Array]  # "inputs" and "targets", token ids
Metrics = dict[str, jax.Array]

SAMPLE = 1  # what the run's key is folded with for the positions of the codes' samples; 0 is for the initial parameters


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
    statistics: Params = field(default_factory=dict)  # of the sparse codes, where the model has them
    skips: Skips | None = None  # steps that changed nothing, where the recipe skips any

    def variables(self, params: Params | None = None) -> Variables:
        """What the model computes with: the statistics and the parameters, or other `params` in their place."""
        return join(self.params if params is None else params, self.statistics)


# ---------------------------------------------------------------------------------------------- the model as functions


def join(params: Params, statistics: Params) -> Variables:
    """Two trees of different leaves as one."""
    both = {**statistics, **params}
    return {
        name: join(params[name], statistics[name]) if name in params and name in statistics else both[name] for name in both
    }


def _model(config: ModelConfig, key: jax.Array) -> GPT | PreNormGPT:
    rngs = nnx.Rngs(params=key)
    return GPT(config, rngs=rngs) if config.family == "compact" else PreNormGPT(config, rngs=rngs)


def graph(config: ModelConfig) -> Any:
    """The model as `nnx.merge` takes it, to be joined with its variables; its dtypes are those of the current device."""
    return _graph(config, current_device())


@functools.cache
def _graph(config: ModelConfig, device: Device) -> Any:
    with targeting(device):
        return nnx.graphdef(nnx.eval_shape(lambda: _model(config, jax.random.key(0))))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """The initial parameters that `key` draws. Under `jax.eval_shape` their shapes alone."""
    return nnx.to_pure_dict(nnx.state(_model(config, key), nnx.Param))


def init_statistics(config: ModelConfig) -> Params:
    """The statistics of the sparse codes at the start; nothing where the model has no code."""
    return nnx.to_pure_dict(nnx.state(_model(config, jax.random.key(0)), Statistic)) if config.levels else {}


def abstract_variables(config: ModelConfig) -> Variables:
    """The shapes and dtypes of a model's variables."""
    return jax.eval_shape(lambda: join(init_params(config, jax.random.key(0)), init_statistics(config)))


@functools.cache
def forward(config: ModelConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The pure function (variables, tokens [B, T]) → logits [B, T, V] of the model that `config` describes."""
    return lambda variables, tokens_BT: nnx.merge(graph(config), variables)(tokens_BT)


@functools.cache
def hidden(config: ModelConfig) -> Callable[[Variables, jax.Array], jax.Array]:
    """The pure function (variables, tokens [B, T]) → what the head multiplies [B, T, D]."""
    return lambda variables, tokens_BT: nnx.merge(graph(config), variables).hidden(tokens_BT)


@functools.cache
def losses(config: ModelConfig) -> Callable[[Variables, jax.Array, jax.Array], jax.Array]:
    """The pure function (variables, inputs [B, T], targets [B, T]) → cross-entropy in nats [B, T], float32."""
    apply = tapped_losses(config)
    return lambda variables, inputs_BT, targets_BT: apply(variables, inputs_BT, targets_BT, jnp.arange(0))[0]


Tapped = Callable[[Variables, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Taps | None]]


@functools.cache
def tapped_losses(config: ModelConfig) -> Tapped:
    """`losses` that takes positions [P] too, and gives what the sparse codes saw there besides; None without codes."""
    return _with_taps(config, loss.token_losses)


def _with_taps(config: ModelConfig, cross_entropy: Callable[..., jax.Array]) -> Tapped:
    def apply(
        variables: Variables, inputs_BT: jax.Array, targets_BT: jax.Array, tapped_P: jax.Array
    ) -> tuple[jax.Array, Taps | None]:
        chex.assert_equal_shape((inputs_BT, targets_BT))
        model = nnx.merge(graph(config), variables)
        inputs_BT, targets_BT = inputs_BT.astype(jnp.int32), targets_BT.astype(jnp.int32)
        x_BTD, taps = model.tapped_hidden(inputs_BT, tapped_P) if config.levels else (model.hidden(inputs_BT), None)
        with jax.named_scope("head"):
            cap, chunk = config.logit_soft_cap, config.logit_chunk
            return cross_entropy(x_BTD, model.embed.table[...], targets_BT, cap=cap, chunk=chunk), taps

    return apply


# ---------------------------------------------------------------------------------------------- the state


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


def _kept_over(config: Config) -> tuple[str, ...]:
    """The mesh's axes over which gradients, optimizer state and averages are split."""
    return ALL_AXES if config.train.shard_optimizer else PARAMETER_AXES


def shardings(config: Config, mesh: Mesh, state: TrainState) -> TrainState:
    """Where each array of a training state lies, in the state's tree; `state` may be abstract."""
    kept = {name: getattr(state, name) for name in ("opt_state", "ema", "swa")}
    return replace(state_shardings(mesh, state), **state_shardings(mesh, kept, _kept_over(config)))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """The state before the first step, each array born on the devices that keep it."""

    def init() -> TrainState:
        return begin(config, init_params(config.model, jax.random.fold_in(jax.random.key(config.train.seed), 0)))

    return jax.jit(init, out_shardings=shardings(config, mesh, jax.eval_shape(init)))()


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, with nothing computed: what a restore aims at."""
    shapes = jax.eval_shape(lambda: init_state(config, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(config, mesh, shapes),
    )


def make_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step (state, batch [A, B/A, T], controls) → (state, {"loss", "grad_norm"}), scalars.

    The loss is the mean over the batch in nats a token; the gradient its exact mean over A microbatches and all devices.
    Each device accumulates its own microbatches and the devices reduce once, after the last: a scan around a global
    gradient would reduce in every turn. Weights that are spread over `fsdp` are gathered once, before the first microbatch.
    Where gradients and what is kept beside the weights are split, each device gets its pieces of the mean and no more, and
    updates those; Muon's matrices are dealt out to the devices (`optim.stacks`).
    Sparse codes see the statistics of the steps before; theirs are updated once, from a sample of all microbatches and
    devices. `controls` are what the host decides for the step; they are traced, so that a schedule driven by the clock
    compiles once. The state passed in is donated.
    Where the recipe skips steps (`optim.skipping`), the metrics have "skipped" and "skipped_in_a_row" too, and a skipped step
    leaves all but the step's number and those counts as it was.
    """
    o, d, t = config.optim, config.data, config.train
    mean_loss = _with_taps(config.model, loss.mean_loss)
    shapes = jax.eval_shape(lambda: init_state(config, mesh))
    layout, scattered = partition_specs(mesh, shapes.params), partition_specs(mesh, shapes.params, _kept_over(config))

    def loss_fn(params: Params, statistics: Params, *batch: jax.Array) -> tuple[jax.Array, Taps | None]:
        return mean_loss(join(params, statistics), *batch)

    def local_mean(
        params: Params, statistics: Params, step: jax.Array, tapped_P: jax.Array, inputs_ABT: jax.Array, targets_ABT: jax.Array
    ) -> tuple[jax.Array, Params, Params]:
        params = gather(params, layout)

        def microbatch(total: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, Taps | None]:
            (loss, taps), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, statistics, *batch, tapped_P)
            return jax.tree.map(jnp.add, total, (loss, grads)), taps

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, taps = jax.lax.scan(microbatch, zero, (inputs_ABT, targets_ABT))
        loss, grads = jax.tree.map(lambda x: x / inputs_ABT.shape[0], total)
        if o.grad_clip_scope == "device":
            grads = clip(grads, o.grad_clip)
        if taps is not None:
            with jax.named_scope("statistics"):
                taps = jax.tree.map(lambda x_ALBP: jnp.swapaxes(x_ALBP, 0, 1), taps)
                statistics = cayley.update_statistics(statistics, taps, step, BATCH_AXES)
        return jax.lax.pmean(loss, BATCH_AXES), reduce_mean(grads, scattered), statistics

    rows = P(None, BATCH_AXES)
    # check_vma would insert a reduction into every microbatch's gradient, since the parameters are the same everywhere
    global_mean = jax.shard_map(
        local_mean, mesh=mesh, in_specs=(layout, P(), P(), P(), rows, rows), out_specs=(P(), scattered, P()), check_vma=False
    )

    def train_step(state: TrainState, batch: Batch, controls: StepControls) -> tuple[TrainState, Metrics]:
        params = state.params
        if o.qat_below:
            # outside of the differentiated function, once a step: the gradient passes through the rounding as it is
            params = qat.straight_through(params, config, controls.qat)
        tapped_P = jnp.arange(0)
        if config.model.levels:
            key = jax.random.fold_in(state.key, SAMPLE)
            tapped_P = cayley.sample_positions(key, state.step, d.seq_len, d.batch_tokens // d.seq_len)
        with jax.named_scope("gradient"):
            loss, grads, statistics = global_mean(
                params, state.statistics, state.step + 1, tapped_P, batch["inputs"], batch["targets"]
            )
        with jax.named_scope("optimizer"):
            optimizer = make_optimizer(o, state.params, mesh, _kept_over(config))
            rates = {"lr_multiplier": controls.lr_multiplier, "adam_lr_multiplier": controls.adam_lr_multiplier}
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **rates)
            # whole again before they are added, where weights are: that and no weight is what the devices exchange
            updates = jax.lax.with_sharding_constraint(updates, state_shardings(mesh, updates))
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("averages"):
            ema = averaging.update_ema(state.ema, params, o.ema_decay) if state.ema is not None else None
            swa = averaging.update_swa(state.swa, params, controls.swa) if state.swa is not None else None
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        after = TrainState(state.step + 1, params, opt_state, state.key, ema, swa, statistics, state.skips)
        if state.skips is not None:
            with jax.named_scope("skipping"):
                skip, skips = skipping.judge(t, state.skips, **metrics)
                after = replace(skipping.select(skip, replace(state, step=after.step), after), skips=skips)
            metrics |= {"skipped": skips.total, "skipped_in_a_row": skips.in_a_row}
        return after, metrics

    # the state comes back laid out as it went in, so that the compiled step can be called on its own result
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings(config, mesh, shapes), NamedSharding(mesh, P())),
        compiler_options=compiler.options(config.train, current_device()),
    )


def make_eval_step(config: ModelConfig, mesh: Mesh, readings: tuple[str, ...] = ("nll",)) -> jax.stages.Wrapped:
    """The jitted function (variables, batch) → the `readings` of `loss.token_readings` by name, [B, S], known to all processes.

    The batch holds "inputs" [B, T] and "targets" [B, S] of S ≤ T scored positions in a row; where S < T also "offsets" [B], the
    first of them in each row, and only theirs are the logits that exist. "hints" [B, S], for hint_nll.
    """
    layout, rows = partition_specs(mesh, abstract_variables(config)), P(BATCH_AXES)

    def local(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graph(config), gather(variables, layout))
        targets_BS = batch["targets"].astype(jnp.int32)
        x_BTD = model.hidden(batch["inputs"].astype(jnp.int32))
        if "offsets" in batch:
            S = targets_BS.shape[1]
            x_BTD = jax.vmap(lambda x_TD, offset: jax.lax.dynamic_slice_in_dim(x_TD, offset, S))(x_BTD, batch["offsets"])
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
        return {name: jax.lax.all_gather(value, BATCH_AXES, tiled=True) for name, value in found.items()}

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(layout, rows), out_specs=P(), check_vma=False))


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every number in `params` is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
