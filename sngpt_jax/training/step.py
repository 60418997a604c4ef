"""One optimizer step, as a pure function of arrays. It knows no files and no clock."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sngpt_kernels.dispatch import current_device

from sngpt_jax.cluster.mesh import BATCH_AXES, gather, partition_specs, reduce_mean, state_shardings
from sngpt_jax.model import cayley, loss
from sngpt_jax.model.cayley import Taps
from sngpt_jax.model.forward import Batch, Params, join, with_taps
from sngpt_jax.optim import averaging, qat, skipping
from sngpt_jax.optim.groups import clip, global_norm
from sngpt_jax.optim.schedules import StepControls
from sngpt_jax.training import compiler
from sngpt_jax.training.state import Shapes, TrainState

Metrics = dict[str, jax.Array]

SAMPLE = 1  # folded into the run's key for the codes' samples; 0 is for the initial parameters


def make_train_step(shapes: Shapes) -> jax.stages.Wrapped:
    """The jitted step (state, batch [A, B/A, T], controls) → (state, metrics).

    The metrics are the scalars "loss", in nats per token, and "grad_norm". The gradient is the
    exact mean over A microbatches and all devices. Each device adds up its own microbatches, and
    the devices reduce once after the last one; a scan around a global gradient would reduce in
    every iteration. Weights that are split over `fsdp` are gathered once. If gradients and
    optimizer state are split, each device updates its own pieces; Muon distributes whole matrices
    to the devices (`optim.stacks`).

    Sparse codes use the statistics of the previous steps. The step updates them once, from a
    sample of all microbatches and devices. `controls` are traced, so a schedule that follows the
    clock compiles once. The state passed in is donated. If the recipe skips steps
    (`optim.skipping`), the metrics also hold "skipped" and "skipped_in_a_row"; a skipped step
    changes only its number and these counts.
    """
    config, mesh, kept_over = shapes.config, shapes.mesh, shapes.kept_over
    o, d, t = config.optim, config.data, config.train
    mean_loss = with_taps(config.model, loss.mean_loss)
    layout = partition_specs(mesh, shapes.state.params)
    scattered = partition_specs(mesh, shapes.state.params, kept_over)

    def local_mean(
        params: Params,
        statistics: Params,
        step: jax.Array,
        tapped_P: jax.Array,
        inputs_ABT: jax.Array,
        targets_ABT: jax.Array,
    ) -> tuple[jax.Array, Params, Params]:
        params = gather(params, layout)

        def microbatch(total: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, Taps | None]:
            def loss_fn(params: Params) -> tuple[jax.Array, Taps | None]:
                return mean_loss(join(params, statistics), *batch, tapped_P)

            (loss, taps), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
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
    # check_vma would reduce the gradient of every microbatch, since all devices have equal weights
    global_mean = jax.shard_map(
        local_mean,
        mesh=mesh,
        in_specs=(layout, P(), P(), P(), rows, rows),
        out_specs=(P(), scattered, P()),
        check_vma=False,
    )

    def train_step(
        state: TrainState, batch: Batch, controls: StepControls
    ) -> tuple[TrainState, Metrics]:
        params = state.params
        if o.qat_below:
            # once per step, outside of the differentiated function: the gradient ignores rounding
            params = qat.straight_through(params, config, controls.qat)
        tapped_P = jnp.arange(0)
        if config.model.levels:
            key, sequences = jax.random.fold_in(state.key, SAMPLE), d.batch_tokens // d.seq_len
            tapped_P = cayley.sample_positions(key, state.step, d.seq_len, sequences)
        with jax.named_scope("gradient"):
            loss, grads, statistics = global_mean(
                params,
                state.statistics,
                state.step + 1,
                tapped_P,
                batch["inputs"],
                batch["targets"],
            )
        with jax.named_scope("optimizer"):
            updates, opt_state = shapes.optimizer.update(
                grads,
                state.opt_state,
                state.params,
                lr_multiplier=controls.lr_multiplier,
                adam_lr_multiplier=controls.adam_lr_multiplier,
            )
            # the devices exchange the updates, never the weights
            updates = jax.lax.with_sharding_constraint(updates, state_shardings(mesh, updates))
            params = optax.apply_updates(state.params, updates)
        with jax.named_scope("averages"):
            ema, swa = state.ema, state.swa
            if ema is not None:
                ema = averaging.update_ema(ema, params, o.ema_decay)
            if swa is not None:
                swa = averaging.update_swa(swa, params, controls.swa)
        metrics = {"loss": loss, "grad_norm": global_norm(grads)}
        after = TrainState(
            state.step + 1, params, opt_state, state.key, ema, swa, statistics, state.skips
        )
        if state.skips is not None:
            with jax.named_scope("skipping"):
                skip, skips = skipping.judge(t, state.skips, **metrics)
                chosen = skipping.select(skip, replace(state, step=after.step), after)
                after = replace(chosen, skips=skips)
            metrics |= {"skipped": skips.total, "skipped_in_a_row": skips.in_a_row}
        return after, metrics

    # the state keeps its layout, so that the compiled step takes its own result
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shapes.shardings, NamedSharding(mesh, P())),
        compiler_options=compiler.options(config.train, current_device()),
    )


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every number in `params` is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
