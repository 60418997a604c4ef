"""Skipped steps: the rule against plain Python, and that a skipped step changes nothing."""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import TrainConfig, changed
from sngpt_jax.optim import skipping
from sngpt_jax.run import checkpoint
from sngpt_jax.training import step
from sngpt_jax.training.step import make_train_step
from tests.training import test_step_code
from tests.training.steps import begin, controls, host_batch, shapes

# a microbatch whose first target is this token has a NaN in its gradient, or an infinite loss
BAD_GRADIENT, BAD_LOSS = 95, 96

CONFIG = changed(
    test_step_code.CONFIG,
    optim={
        "schedule": "linear_warmdown",
        "warmdown_steps": 4,
        "ema_decay": 0.9,
        "swa_every": 1,
        "swa_below": 0.9,
    },
    train={"nonfinite": "skip", "spike_sigma": 6.0},
)
CONTROLS = controls(swa=True)


def expected_skips(config, losses, norms):
    """The rule with lists: (skipped, in a row) after each step."""
    kept_losses, kept_norms, total, in_a_row, found = [], [], 0, 0, []
    for loss, norm in zip(losses, norms, strict=True):
        finite = math.isfinite(loss) and math.isfinite(norm)
        skip = config.nonfinite == "skip" and not finite
        if finite and config.spike_sigma and len(kept_losses) >= 64:
            for value, kept in ((loss, kept_losses[-128:]), (norm, kept_norms[-128:])):
                skip |= value > statistics.mean(kept) + config.spike_sigma * statistics.stdev(kept)
        if finite:
            kept_losses.append(loss)
            kept_norms.append(norm)
        total, in_a_row = total + skip, in_a_row + 1 if skip else 0
        found.append((total, in_a_row))
    return found


@pytest.mark.parametrize("config", [TrainConfig(nonfinite="skip"), TrainConfig(spike_sigma=3.0)])
def test_what_is_skipped_is_what_the_rule_says(config):
    rng = np.random.default_rng(0)
    losses, norms = (np.float32(rng.normal(*of, 400)) for of in ((3, 0.1), (1, 0.2)))
    losses[[30, 100, 101, 250]] = 4.0  # the first comes before there is enough to measure it by
    norms[[150, 151]] = 9.0
    losses[300:] += 1.0  # for good
    losses[[70, 200, 201, 390]] = [np.nan, np.inf, -np.inf, np.nan]
    norms[[71, 202]] = [np.inf, np.nan]
    judge = jax.jit(functools.partial(skipping.judge, config))
    skips, found = skipping.init_skips(config), []
    for loss, norm in zip(losses, norms, strict=True):
        _, skips = judge(skips, loss, norm)
        found.append((int(skips.total), int(skips.in_a_row)))
    expected = expected_skips(config, losses.tolist(), norms.tolist())
    assert found == expected
    assert expected[-1][0] >= 6
    if config.spike_sigma:
        assert expected[99][0] == 0, "a step that is not finite, or one too early, is no spike"
        assert expected[310][0] > expected[299][0] + 1
        assert expected[380] == (expected[370][0], 0), "a new level has become normal"


@pytest.mark.parametrize(("loss", "spike"), [(6.02, False), (6.03, True)])
def test_deviations_are_those_of_a_sample(loss, spike):
    """2, 4, 2, 4 …, 64 values: mean 3, deviation sqrt(64 / 63), so that three end at 6.0237."""
    config = TrainConfig(spike_sigma=3.0)
    skips = skipping.init_skips(config)
    for i in range(64):
        _, skips = skipping.judge(config, skips, jnp.float32(2 + 2 * (i % 2)), jnp.float32(1))
    assert bool(skipping.judge(config, skips, jnp.float32(loss), jnp.float32(1))[0]) is spike


def test_nothing_is_kept_where_nothing_is_skipped():
    assert skipping.init_skips(TrainConfig()) is None
    assert skipping.init_skips(TrainConfig(nonfinite="skip")).window is None


def poisoned(mean_loss):
    """`mean_loss` with a NaN in its gradient, or infinite, where the first target says so."""

    def loss(x_BTD, table_VD, targets_BT, **settings):
        first = targets_BT[0, 0]
        # its slope at 0 is infinite
        root = jnp.sqrt(jnp.where(first == BAD_GRADIENT, 0.0 * x_BTD[0, 0, 0], 1.0))
        added = 0.0 * root + jnp.where(first == BAD_LOSS, jnp.inf, 0.0)
        return mean_loss(x_BTD, table_VD, targets_BT, **settings) + added

    return loss


def bad_batch(seed, first_target=0):
    batch = host_batch(seed, vocab=94)
    if first_target:
        batch["targets"][10, 0] = first_target  # one microbatch of one of eight devices
    return batch


@functools.cache
def program(devices):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step.loss, "mean_loss", poisoned(step.loss.mean_loss))
        found = shapes(CONFIG, devices)
        batch = batch_placer(found.mesh, 16 // devices)(bad_batch(0))
        return make_train_step(found).lower(found.state, batch, CONTROLS).compile()


def take(devices, state, *batches):
    """The state after these batches, and the metrics of each step."""
    place, seen = batch_placer(shapes(CONFIG, devices).mesh, 16 // devices), []
    for batch in batches:
        state, metrics = program(devices)(state, place(batch), CONTROLS)
        seen.append({name: value.item() for name, value in metrics.items()})
    return state, seen


def assert_equal(a, b):
    def check(path, x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, a, b)


def without_skips(state):
    return dataclasses.replace(state, skips=None)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("bad", [BAD_GRADIENT, BAD_LOSS])
def test_a_run_with_a_bad_batch_is_the_run_without_its_update(devices, bad):
    state, said = take(devices, begin(CONFIG, devices), bad_batch(0), bad_batch(1, bad))
    assert [math.isfinite(s["loss"]) for s in said] == [True, bad == BAD_GRADIENT]
    assert [math.isfinite(s["grad_norm"]) for s in said] == [True, bad == BAD_LOSS]
    assert [(s["skipped"], s["skipped_in_a_row"]) for s in said] == [(0, 0), (1, 1)]
    without, _ = take(devices, begin(CONFIG, devices), bad_batch(0))
    without = dataclasses.replace(without, step=without.step + 1)
    assert_equal(without_skips(state), without_skips(without))
    assert_equal(state.skips.window, without.skips.window)

    # and the step after it is that of a run that never saw the batch
    state, said = take(devices, state, bad_batch(2))
    without, _ = take(devices, without, bad_batch(2))
    assert (said[0]["skipped"], said[0]["skipped_in_a_row"]) == (1, 0)
    assert_equal(without_skips(state), without_skips(without))


def test_what_was_skipped_is_known_to_a_resumed_run(tmp_path):
    bad = bad_batch(1, BAD_LOSS)
    state, _ = take(1, begin(CONFIG), bad_batch(0), bad, bad)
    with checkpoint.Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
    resumed = checkpoint.restore(tmp_path, shapes(CONFIG).state).state
    assert_equal(resumed, state)
    assert int(resumed.skips.window.count) == 1
    _, (said,) = take(1, resumed, bad_batch(2, BAD_LOSS))
    assert (said["skipped"], said["skipped_in_a_row"]) == (3, 3)
