"""The training step of a model with sparse codes: statistics, devices, and checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels.cayley import dictionary, reference

from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    changed,
    parse_levels,
)
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.model.cayley import code_state, sample_positions
from sngpt_jax.model.forward import tapped_losses
from sngpt_jax.run import checkpoint
from sngpt_jax.training.step import SAMPLE
from tests.training.steps import as_int32, begin, host_batch, in_float64, run, shapes, take

CONFIG = Config(
    model=ModelConfig(
        family="pre_norm",
        vocab_size=97,
        num_layers=2,
        d_model=64,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=128,
        mlp_activation="gelu",
        levels=parse_levels("6,4,0;10,8,16"),
        max_seq_len=16,
        positions="learned",
        qk_norm=False,
        matrix_init="normal",
        embed_init_std=0.02,
        logit_soft_cap=0.0,
        logit_chunk=24,
        norm_eps=1e-5,
        compute_dtype="float32",
    ),
    optim=OptimConfig(
        muon_lr=0.01,
        embed_lr=0.01,
        scalar_lr=0.01,
        schedule="constant",
        newton_schulz_dtype="float32",
        muon_momentum_warmup_steps=0,
        grad_clip=1.0,
        adam_weight_decay=0.5,
    ),
    data=DataConfig(batch_tokens=256, seq_len=16, slices=4),
    train=TrainConfig(steps=4, device_batch_tokens=64, seed=3),
)


SPREAD = {"devices": 8, "fsdp": 8, "microbatches": 2}  # one program for all tests


def on_host(state):
    return in_float64((state.params, state.statistics))


@functools.cache
def probe(model):
    """The jitted `tapped_losses`."""
    return jax.jit(tapped_losses(model))


def seen(model, variables, batch, positions=None):
    """The losses of a batch, and the taps at `positions`, by default at all."""
    inputs, targets = as_int32(batch).values()
    tapped = jnp.arange(inputs.shape[1]) if positions is None else positions
    return probe(model)(variables, inputs, targets, tapped)


def test_statistics_of_a_step_are_those_of_its_tokens():
    """Every token is in the sample here: 1024 / 16 sequences exceed the 16 positions of each."""
    start = begin(CONFIG)
    _, taps = seen(CONFIG.model, start.variables(), host_batch())
    before = code_state(start.variables())
    np.testing.assert_array_equal(before.std, np.ones((2, 1024)))
    assert not before.mean.any() and not before.last_fired.any() and not before.bias.any()

    state, _ = run(CONFIG, 1)
    after = code_state(state.variables())
    atoms = dictionary.atoms(np.arange(1024), 64)
    for layer in range(2):
        x = np.asarray(taps.x[layer], np.float64).reshape(-1, 64)
        np.testing.assert_allclose(after.mean[layer], 0.01 * x.mean(0), atol=1e-7)
        np.testing.assert_allclose(after.std[layer], 0.99 + 0.01 * (x @ atoms.T).std(0), atol=1e-6)
        fired = np.isin(np.arange(1024), np.asarray(taps.ids[layer]))
        np.testing.assert_array_equal(after.last_fired[layer], np.where(fired, 1, 0))
        assert 0 < fired.sum() < 1024


@pytest.mark.parametrize(("devices", "dtype"), [(8, "float32"), (1, "bfloat16")])
def test_a_thinned_sample_of_trained_statistics(devices, dtype):
    """32 of 64 positions of each sequence, others at every step."""
    config = changed(
        CONFIG,
        model={"num_layers": 1, "max_seq_len": 64, "compute_dtype": dtype},
        data={"batch_tokens": 32 * 64, "seq_len": 64},
    )
    batch, rng = host_batch(shape=(32, 64)), np.random.default_rng(0)
    state = begin(config, devices)
    code = state.statistics["blocks"][0]["code"]
    code["mean"] = jnp.asarray(rng.normal(size=64) * 0.1, jnp.float32)
    code["std"] = jnp.asarray(rng.uniform(0.5, 2.0, 1024), jnp.float32)
    drawn = []
    for number in (1, 2):
        before = on_host(state)[1]["blocks"][0]["code"]
        variables = jax.device_get(state.variables())
        key = jax.random.fold_in(jax.random.key(3), SAMPLE)
        positions = sample_positions(key, jnp.int32(number - 1), 64, 32)
        _, taps = seen(config.model, variables, batch, positions)
        state, _ = take(config, state, batch, devices=devices)
        after = on_host(state)[1]["blocks"][0]["code"]
        x = np.asarray(taps.x[0], np.float64).reshape(-1, 64)
        mean, std = reference.update_statistics(before["mean"], before["std"], x)
        tolerance = 1e-6 if dtype == "float32" else 1e-4  # rounded to bfloat16 in another order
        np.testing.assert_allclose(after["mean"], mean, atol=tolerance)
        np.testing.assert_allclose(after["std"], std, atol=tolerance)
        fired = np.isin(np.arange(1024), np.asarray(taps.ids))
        assert np.mean((after["last_fired"] == number) != fired) < 0.002
        drawn.append(set(positions.tolist()))
    assert len(drawn[0]) == 32 and drawn[0] != drawn[1]
    code = state.statistics["blocks"][0]["code"]
    assert code["mean"].dtype == code["std"].dtype == jnp.float32


def test_each_rule_has_its_own_rate():
    for muon, adam in ((1.0, 0.0), (0.0, 1.0)):
        state = begin(CONFIG)
        before = on_host(state)[0]
        after = on_host(take(CONFIG, state, host_batch(), rate=muon, adam=adam)[0])[0]
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
        assert moved["blocks"][0]["mlp"] == {"up": muon > 0, "down": muon > 0}
        bias = moved["blocks"][0]["code"]["bias"]
        assert bias == moved["embed"]["table"] == moved["final_norm"] == (adam > 0)


def test_a_step_sees_the_statistics_of_the_step_before():
    first, _ = run(CONFIG, 1)

    def loss(variables):
        return float(seen(CONFIG.model, variables, host_batch(1))[0].mean())

    own = loss(first.variables())
    fresh = begin(CONFIG).statistics
    stale = loss(dataclasses.replace(first, statistics=fresh).variables())
    state, found = take(CONFIG, first, host_batch(1))
    assert found["loss"] == pytest.approx(own, rel=1e-6)
    assert found["loss"] != pytest.approx(stale, rel=1e-6)
    assert int(code_state(state.variables()).last_fired.max()) == 2


def test_statistics_do_not_depend_on_devices_or_microbatches():
    """Updated once a step, whatever the microbatches, and from all devices' tokens. The thinned
    sample is the case of 8 devices with whole weights.
    """
    one = on_host(run(CONFIG, 1)[0])[1]
    for layout in ({"microbatches": 4}, SPREAD):
        other = on_host(run(CONFIG, 1, **layout)[0])[1]
        for block in other["blocks"]:
            a, b = (tree["blocks"][block]["code"] for tree in (one, other))
            for name in ("mean", "std"):
                where = f"{layout}: {name}"
                np.testing.assert_allclose(a[name], b[name], atol=1e-6, err_msg=where)
            assert np.mean(a["last_fired"] != b["last_fired"]) < 0.002, "but for a feature at a tie"


@pytest.mark.full
def test_twenty_steps_on_one_and_eight_devices():
    one, *others = (
        [metrics["loss"] for metrics in run(CONFIG, 20, devices, fsdp)[1]]
        for devices, fsdp in ((1, 1), (8, 1), (8, 8))
    )
    for other in others:
        np.testing.assert_allclose(other, one, atol=1e-3)


def test_spread_weights_train_as_whole_ones():
    whole, spread = run(CONFIG, 2)[0], run(CONFIG, 2, **SPREAD)[0]
    near = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(near, on_host(whole)[0], on_host(spread)[0])
    up = spread.params["blocks"][0]["mlp"]["up"]
    assert up.addressable_shards[0].data.size * 8 == up.size
    moments = [leaf for leaf in jax.tree.leaves(spread.opt_state) if leaf.shape == up.shape]
    assert moments and all(leaf.sharding == up.sharding for leaf in moments)


def test_evaluation_takes_spread_weights_and_leaves_the_statistics_alone():
    rows = {}
    for layout in ({"devices": 1, "fsdp": 1}, SPREAD):
        devices = layout["devices"]
        mesh = shapes(CONFIG, devices, layout["fsdp"]).mesh
        state = run(CONFIG, 2, **layout)[0]
        before, batch = on_host(state)[1], batch_placer(mesh)(host_batch(9))
        rows[devices] = make_eval_step(CONFIG.model, mesh)(state.variables(), batch)["nll"]
        jax.tree.map(np.testing.assert_array_equal, on_host(state)[1], before)
    np.testing.assert_allclose(rows[8], rows[1], rtol=1e-4)


def test_a_run_goes_on_from_a_checkpoint_to_the_last_bit(tmp_path):
    state, _ = run(CONFIG, 3)
    with checkpoint.Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, state, {})
    restored = checkpoint.restore(tmp_path, shapes(CONFIG).state).state
    jax.tree.map(np.testing.assert_array_equal, on_host(restored), on_host(state))
    ends = []
    for start in (state, restored):
        for i in (3, 4):
            start, metrics = take(CONFIG, start, host_batch(i))
        ends.append((on_host(start), metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert ends[0][0][1]["blocks"][0]["code"]["last_fired"].max() == 5


def test_a_checkpoint_of_spread_weights_serves_any_layout(tmp_path):
    spread, _ = run(CONFIG, 2, **SPREAD)
    with checkpoint.Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, spread, {})
    for devices, fsdp in ((1, 1), (8, 4)):
        restored = checkpoint.restore(tmp_path, shapes(CONFIG, devices, fsdp).state).state
        jax.tree.map(np.testing.assert_array_equal, on_host(restored), on_host(spread))
        up = restored.params["blocks"][0]["mlp"]["up"]
        assert up.addressable_shards[0].data.size * fsdp == up.size


def test_biases_learn_and_do_not_decay():
    """A first step of Adam moves by at most its rate, and the decay of a gain of 1 adds half."""
    state, rate = begin(CONFIG), CONFIG.optim.scalar_lr
    params = state.params
    params["blocks"][1]["code"]["bias"] = jnp.full((1024,), 0.5)
    state, _ = take(CONFIG, dataclasses.replace(state, params=params), host_batch())
    after = on_host(state)[0]
    moved = np.abs(after["blocks"][1]["code"]["bias"] - 0.5)
    assert 0.9 * rate < moved.max() < 1.01 * rate, "no bias has learnt, or one decays"
    assert moved.min() == 0, "a feature that nothing selected has moved"
    assert np.abs(after["final_norm"] - 1).max() > 1.4 * rate, "gains do decay"
