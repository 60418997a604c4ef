"""Training steps whose optimizer is shared out: equal numbers for any layout, and collectives."""

import functools

import jax
import numpy as np
import pytest

from sngpt_jax.ahead import hlo
from sngpt_jax.cluster.mesh import batch_placer, path_name
from sngpt_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, changed
from sngpt_jax.optim.averaging import averaged_weights
from sngpt_jax.run import checkpoint
from sngpt_jax.training.state import init_state
from sngpt_jax.training.step import make_train_step
from tests.training.steps import controls, host_batch, shapes

CONFIG = Config(
    model=ModelConfig(
        vocab_size=128,
        num_layers=3,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=128,
        max_seq_len=16,
        compute_dtype="float32",
    ),
    optim=OptimConfig(
        schedule="constant",
        newton_schulz_dtype="float32",
        newton_schulz_steps=3,
        muon_weight_decay=0.1,
        adam_weight_decay=0.1,
        grad_clip=0.3,
        ema_decay=0.5,
        swa_every=1,
        swa_below=1.0,
    ),
    data=DataConfig(batch_tokens=256, seq_len=16, slices=4),
    train=TrainConfig(steps=4, device_batch_tokens=16, seed=3),
)
CONTROLS = controls(swa=True)
# matrices: 64×64 (query, out), 64×32 (key, value: too small to be split), 64×128 (up, down)
LAYOUTS = {  # devices, fsdp, shard_optimizer: the update's collectives
    (8, 1, False): {"all-gather": 3},
    (8, 8, False): {"all-gather": 1, "all-to-all": 4},
    (8, 1, True): {"all-gather": 3, "all-to-all": 2},
    (8, 2, True): {"all-gather": 1, "all-to-all": 4},
}
full = pytest.mark.full
EVERYDAY = ((8, 1, False), (8, 2, True))
EACH = [layout if layout in EVERYDAY else pytest.param(layout, marks=full) for layout in LAYOUTS]


def laid_out(layout, **optim):
    devices, fsdp, shard_optimizer = layout
    train = {"fsdp": fsdp, "shard_optimizer": shard_optimizer}
    return shapes(changed(CONFIG, train=train, optim=optim), devices, fsdp)


@functools.cache
def program(layout, **optim):
    """The compiled step with two microbatches, and what it does."""
    found = laid_out(layout, **optim)
    batch = batch_placer(found.mesh, 2)(host_batch(0, vocab=128))
    compiled = make_train_step(found).lower(found.state, batch, CONTROLS).compile()
    return compiled, hlo.analyse(compiled.as_text())


def train(layout, steps=2, state=None, first=0, **optim):
    found, losses = laid_out(layout, **optim), []
    state, place = state or init_state(found), batch_placer(found.mesh, 2)
    for i in range(first, first + steps):
        batch = place(host_batch(i, vocab=128))
        state, metrics = program(layout, **optim)[0](state, batch, CONTROLS)
        losses.append(float(metrics["loss"]))
    return state, losses


def on_host(state):
    kept = {name: getattr(state, name) for name in ("params", "opt_state", "ema", "swa")}
    leaves = jax.tree_util.tree_leaves_with_path(kept)
    return {path_name(path): np.asarray(leaf) for path, leaf in leaves}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        # Adam's first steps magnify the rounding of gradients of about 0
        atol = 1e-3 * np.abs(b[name]).max() if "opt_state" in name else 1e-4
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "layout",
    [*EACH, pytest.param((2, 1, True), marks=full), pytest.param((8, 4, False), marks=full)],
)
def test_layouts_leave_losses_weights_and_moments_alone(layout):
    (one, losses), (other, found) = train((1, 1, False)), train(layout)
    np.testing.assert_allclose(found, losses, atol=1e-5)
    assert_close(on_host(other), on_host(one))


@pytest.mark.parametrize("layout", EACH)
def test_collectives_of_the_update(layout):
    """At most two per distinct shape of matrix, and none inside the loop over the microbatches."""
    found = program(layout)[1].collectives
    assert found and all(collective.times == 1 for collective in found)
    update = [c for c in found if "optimizer/shard_map" in c.scope]
    kinds = [c.opcode for c in update]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == LAYOUTS[layout]
    # beside Muon's: the norm of a split gradient, and the update of a split embedding
    others = [c.opcode for c in found if "optimizer" in c.scope and c not in update]
    assert set(others) <= {"all-reduce", "all-gather"} and others.count("all-gather") <= 1


@pytest.mark.parametrize("layout", EACH)
def test_gradients_are_scattered_where_the_optimizer_is_split(layout):
    _, fsdp, shard_optimizer = layout
    moved = program(layout)[1].collective_counts()
    state = laid_out(layout).state
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2]
    split = sum(size for size in sizes if size >= 2**14)
    if fsdp > 1 or shard_optimizer:
        assert moved["reduce-scatter"][1] == split
        left = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params)) - split
        assert moved["all-reduce"][1] <= left + 1024
    else:
        assert "reduce-scatter" not in moved and moved["all-reduce"][1] >= split
    kept = (state.opt_state, state.ema, state.swa)
    for tree, over in ((state.params, fsdp), (kept, 8 if shard_optimizer else fsdp)):
        for leaf in jax.tree.leaves(tree):
            share = np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)
            assert share * (over if leaf.ndim == 2 and leaf.size >= 2**12 else 1) == leaf.size


@pytest.mark.full
def test_averages_that_are_split_come_back_as_the_weights_lie():
    found = laid_out((8, 1, True))
    state, _ = train((8, 1, True))
    whole = jax.tree.map(lambda leaf: leaf.sharding, found.state.params)
    for average in (state.ema, state.swa):
        weights = averaged_weights(average, found.mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, weights) == whole
        mean = average if average is state.ema else average.mean
        jax.tree.map(np.testing.assert_array_equal, weights, mean)


@pytest.mark.full
def test_a_run_goes_on_with_another_layout(tmp_path):
    """Two steps with one layout and two with another are four on one device."""
    state, _ = train((8, 1, True))
    with checkpoint.Checkpointer(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state, {})
    straight = on_host(train((1, 1, False), steps=4)[0])
    for layout in ((1, 1, False), (8, 8, False)):
        restored = checkpoint.restore(tmp_path, laid_out(layout).state).state
        assert_close(on_host(train(layout, state=restored, first=2)[0]), straight)


@pytest.mark.full
def test_normuon_and_polar_express_over_many_devices():
    """What the neurons' mean squares add are vectors."""
    options = {"normuon_beta2": 0.9, "muon_coefficients": "polar_express", "newton_schulz_steps": 5}
    one, other = (train(layout, **options)[0] for layout in ((1, 1, False), (8, 8, False)))
    assert_close(on_host(other), on_host(one))
    plain, with_norms = (program((8, 8, False), **o)[1].collective_counts() for o in ({}, options))
    moved, before = (sum(size for _, size in counts.values()) for counts in (with_norms, plain))
    assert before < moved < before + 4 * 3 * (2 * 64 + 2 * 32 + 128 + 64) * 2
