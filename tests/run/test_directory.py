"""Who may write to a run directory, and which weights it gives out."""

import dataclasses

import jax
import numpy as np
import pytest

from sngpt_jax.base.errors import UserError, one_line
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, changed, to_json
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.optim.averaging import update_swa
from sngpt_jax.run import directory as run_directory
from sngpt_jax.run.checkpoint import Checkpointer
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.weights.source import load_model


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory):
    """A run without an EMA: its SWA is empty at step 0 and holds twice the weights at step 1."""
    run_dir = tmp_path_factory.mktemp("run")
    averages = {"ema_decay": 0.0, "average_table_dtype": "bfloat16"}
    config = changed(load(str(tiny_recipe)), optim=averages, eval={"weights": "swa"})
    run_directory.begin(run_dir, config, None)
    state = init_state(Shapes.of(config, make_mesh(jax.devices()[:1])))
    doubled = jax.tree.map(lambda p: 2 * p, state.params)
    later = dataclasses.replace(state, swa=update_swa(state.swa, doubled, True))
    with Checkpointer(run_directory.checkpoint_dir(run_dir), keep=2) as checkpoints:
        checkpoints.save(0, state, extra={})
        checkpoints.save(1, later, extra={})
    return run_dir, state.params


def test_the_weights_asked_for_are_given(run):
    run_dir, params = run
    mesh = make_mesh(jax.devices()[:1])
    final, mean = (load_model(run_dir, mesh, weights=name) for name in ("final", "swa"))
    assert (final.weights, final.step, mean.weights, mean.step) == ("final", 1, "swa", 1)
    trees = (final.variables, mean.variables, params)
    for given, average, p in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(given, p)
        assert average.dtype == np.float32  # whatever the average is kept in
        np.testing.assert_allclose(average, 2 * p, rtol=2**-8)
    assert load_model(run_dir, mesh).weights == "swa", "the recipe says so"


@pytest.mark.parametrize(
    ("step", "weights", "said"),
    [
        (None, "ema", "keeps no such average .optim.ema_decay = 0.; take --weights final"),
        (0, "swa", "--weights swa: no snapshot was taken up to step 0"),
        (0, None, "--weights swa: no snapshot was taken up to step 0"),
    ],
)
def test_an_average_that_is_not_there_is_an_error(run, step, weights, said):
    with pytest.raises(UserError, match=said):
        load_model(run[0], make_mesh(jax.devices()[:1]), step, weights)


def test_a_run_goes_on_with_its_weights_spread_over_other_devices(tmp_path, tiny_recipe):
    config = load(str(tiny_recipe))
    run_directory.begin(tmp_path, config, None)
    with run_directory.claim(tmp_path, changed(config, train={"fsdp": 4, "shard_optimizer": True})):
        pass
    for tokens, taken in ((0, 64), (512, 512)):  # 0: the run's own
        other = changed(config, train={"device_batch_tokens": tokens})
        with run_directory.claim(tmp_path, other) as own:
            assert own.train.device_batch_tokens == taken
    other = run_directory.claim(tmp_path, changed(config, train={"fsdp": 4, "seed": 1}))
    with pytest.raises(UserError, match=r"undo: train\.seed: 1337 -> 1$"), other:
        pass


def test_other_data_than_the_run_began_with_are_refused(tmp_path, tiny_recipe):
    data = open_dataset(tiny_recipe.parent / "data", 320)
    run_directory.keep_data(tmp_path, data)
    run_directory.keep_data(tmp_path, data)
    shard, *rest = data.manifest.train
    shards = (dataclasses.replace(shard, sha256="0" * 64), *rest)
    manifest = dataclasses.replace(data.manifest, train=shards)
    said = "not the data that the run in .* began with .* choose another --run-dir"
    with pytest.raises(UserError, match=said):
        run_directory.keep_data(tmp_path, dataclasses.replace(data, manifest=manifest))
    fewer = dataclasses.replace(data, train=data.val, manifest=None)
    said = f"{len(data.train):,} training .* then, {len(data.val):,} training .* now"
    with pytest.raises(UserError, match=said):
        run_directory.keep_data(tmp_path, fewer)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"train_tokens": "x", "val_tokens": 1, "sha256": ""}', "{"]
)
def test_a_note_of_the_data_that_is_none_is_one_line(tmp_path, tiny_recipe, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json(\.train_tokens)?: "):
        run_directory.keep_data(tmp_path, open_dataset(tiny_recipe.parent / "data", 320))


def test_a_lock_that_is_a_link_empties_no_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "file")
    with run_directory.claim(tmp_path / "run", Config()):
        assert (tmp_path / "file").read_text() == "kept"


def test_a_finished_run_is_claimed_without_a_write(tmp_path, monkeypatch):
    def refused(*arguments):
        raise AssertionError("a lock writes")

    config = load("quickstart")
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "config.json").write_text(to_json(config))
    monkeypatch.setattr(run_directory, "locked", refused)
    with run_directory.claim(tmp_path, config):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "summary.json"]
    other = changed(config, train={"seed": 5})
    with pytest.raises(UserError, match="run of another configuration"):
        run_directory.claim(tmp_path, other).__enter__()


def test_what_a_killed_run_left_half_written_is_deleted(tmp_path):
    (tmp_path / "summary.json.tmp-123").write_text("{")
    (tmp_path / "somebodys.tmp-notes").write_text("kept")
    (tmp_path / "somebodys.tmp-1").mkdir()
    with run_directory.claim(tmp_path, Config()):
        left = {path.name for path in tmp_path.glob("*.tmp-*")}
    assert left == {"somebodys.tmp-notes", "somebodys.tmp-1"}


def test_a_mark_that_cannot_be_left_for_the_other_processes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    (tmp_path / ".shared").mkdir()  # what a file cannot replace
    with pytest.raises(OSError) as error, run_directory.claim(tmp_path, Config()):
        pass
    said = f"{tmp_path}/.shared: Is a directory; check the path and its permissions"
    assert one_line(error.value) == said


@pytest.mark.parametrize("name", ["a[b]", "a\\b", "c:", "d\udcff"])
def test_a_path_that_cannot_hold_checkpoints_is_refused_before_the_run(tmp_path, name):
    path = tmp_path / name
    with (
        pytest.raises(UserError, match="checkpoints cannot lie under a path with .*; choose"),
        run_directory.claim(path, Config()),
    ):
        raise AssertionError("claimed")
    assert not list(tmp_path.iterdir())
