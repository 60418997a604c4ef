"""The commands that import and export the scripts' checkpoints."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from sngpt_jax import evaluate, interop, sample
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import changed
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.run.checkpoint import Checkpointer, steps
from sngpt_jax.weights.source import load_model
from tests import golf_oracle, tiny_run

# on top of tests/tiny_run.py's recipe
OVERRIDES = ["--model.smear", "before_norm", "--model.value-residual", "True"]
OVERRIDES += ["--model.recycle-layers", "0", "--model.bigram-buckets", "16"]
AVERAGES = ["--optim.ema-decay", "0.9", "--optim.swa-every", "2"]


def status(arguments: list[object], capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as exit_, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["interop", *map(str, arguments)])
        cli.run(interop.main)
    printed = capsys.readouterr()
    return exit_.value.code, printed.out, printed.err


@pytest.fixture(scope="module")
def checkpoint_file(tiny_recipe, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    parts = {"smear": "before_norm", "value_residual": True, "recycle_layers": (0,)}
    config = changed(load(str(tiny_recipe)), model={**parts, "bigram_buckets": 16}).model
    state = golf_oracle.random_state(config, "banked", seed=12)
    path = tmp_path_factory.mktemp("checkpoint") / "final_model.safetensors"
    safetensors.numpy.save_file(state, path)
    return path, state


def test_import_then_export(tiny_recipe, checkpoint_file, tmp_path, capsys):
    file, state = checkpoint_file
    run_dir = tmp_path / "run"
    arguments = ["import", file, "--config", tiny_recipe, "--run-dir", run_dir]
    arguments += [*OVERRIDES, *AVERAGES]
    code, out, err = status(arguments, capsys)
    assert code == 0, err
    assert f"imported\n  from        {file}\n  checkpoint  {run_dir}/checkpoints/00000000\n" in out
    tokenizer = tiny_recipe.parent / "data" / "tokenizer.model"
    assert (run_dir / "tokenizer.model").read_bytes() == tokenizer.read_bytes()

    with pytest.raises(UserError, match="no snapshot was taken up to step 0"):
        load_model(run_dir, make_mesh(), weights="swa")

    total = sum(tensor.size for tensor in state.values())
    for weights in ("final", "ema"):
        out_file = tmp_path / f"{weights}.safetensors"
        export = ["export", "--run", run_dir, "--out", out_file, "--weights", weights]
        code, out, err = status(export, capsys)
        assert code == 0, err
        assert f"{len(state)} tensors, {total:,} parameters of step 0, {weights} weights" in out
        found = safetensors.numpy.load_file(out_file)
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    code, out, err = status(arguments, capsys)
    assert (code, out) == (2, "")
    assert "checkpoints: holds checkpoints already; choose another --run-dir" in err


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.full)])
def test_imported_runs_are_scored_and_trained_on(
    tiny_recipe, checkpoint_file, tmp_path, capsys, trained
):
    """The loss of the script's model on these tokens. `train` validates before its first step."""
    file, state = checkpoint_file
    run_dir = tmp_path / "run"
    recipe = ["--config", tiny_recipe, "--run-dir", run_dir, *OVERRIDES]
    recipe += ["--train.steps", "4", "--eval.tokens", "1024"]
    assert status(["import", file, *recipe], capsys)[0] == 0

    config = load(str(run_dir / "config.json")).model
    data = open_dataset(tiny_recipe.parent / "data", config.vocab_size)
    stream = data.val.take(0, 1025).astype(np.int64)
    logits = golf_oracle.logits(state, config, stream[:-1].reshape(-1, 32))
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_p.reshape(1024, -1), stream[1:, None], axis=1))

    if not trained:
        assert evaluate.main(["--run", str(run_dir), "--json", "--tokens", "1024"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(expected, abs=1e-5)
        return
    done = tiny_run.run("train", *recipe)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert [line["val_loss"] for line in lines if "val_loss" in line][-1] < expected


def test_killed_import_is_done_again_and_never_trained_from_drawn_weights(
    tiny_recipe, checkpoint_file, tmp_path, capsys, monkeypatch
):
    file, state = checkpoint_file
    run_dir = tmp_path / "run"
    recipe = ["--config", tiny_recipe, "--run-dir", run_dir, *OVERRIDES]

    def killed(self, step, *_, **__):
        (self._directory / f"{step:08d}").mkdir()  # half a checkpoint
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            interop.main(["import", str(file), *map(str, recipe)])
    done = tiny_run.run("train", *recipe)
    assert done.returncode == 2 and "import of its weights did not finish; run the" in done.stderr
    assert not (run_dir / "metrics.jsonl").exists()
    assert status(["import", file, *recipe], capsys)[0] == 0
    assert steps(run_dir / "checkpoints") == [0]
    out = tmp_path / "out.safetensors"
    assert status(["export", "--run", run_dir, "--out", out], capsys)[0] == 0
    found = safetensors.numpy.load_file(out)
    assert all(np.array_equal(found[name], tensor) for name, tensor in state.items())


def test_a_run_without_a_tokenizer_says_so(tiny_recipe, checkpoint_file, tmp_path, capsys):
    arguments = ["import", checkpoint_file[0], "--config", tiny_recipe, *OVERRIDES]
    arguments += ["--data.dir", tmp_path / "none", "--run-dir"]
    bare, given = tmp_path / "bare", tmp_path / "given"
    code, _, err = status([*arguments, bare], capsys)
    assert (code, err.count("the run will keep no tokenizer")) == (0, 1)
    assert not list(bare.glob("tokenizer*"))
    data = tiny_recipe.parent / "data"
    options = ["--run", str(bare), "--weights", "final"]
    assert evaluate.main([*options, "--data", str(data), "--tokens", "512"]) == 0
    assert "bits/byte" in capsys.readouterr().out
    with pytest.raises(UserError, match="keeps no tokenizer; import its weights with --tokenizer"):
        sample.main(options)
    assert load_model(bare, make_mesh()).step == 0

    tokenizer = data / "tokenizer.model"
    code, _, err = status([*arguments, given, "--tokenizer", tokenizer], capsys)
    assert (code, "keep no tokenizer" in err) == (0, False)
    assert (given / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


TOO_LARGE = ["--tokenizer", "{tokenizer}", "--model.vocab-size", "319"]
TO = ["--config", "{recipe}", "--run-dir", "{tmp}/run"]
FROM = ["export", "--run", "{tmp}/run", "--out"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["import", "{file}", *TO], r"recycle_mods.0.scale \[32\] is not a tensor of this model"),
        (["import", "{tmp}/absent.npz", *TO], "absent.npz: cannot be read: No such"),
        (["import", "{tmp}", *TO], "expected a file named"),
        (
            ["import", "{file}", *TO, *TOO_LARGE],
            "model: expected at most .* = 319 tokens, found 320",
        ),
        ([*FROM, "{tmp}/x.safetensors"], "run: not a run directory"),
        ([*FROM, "{tmp}/x.pt"], "x.pt: expected a file named \\*.safetensors"),
        (["convert"], "expected import or export after sngpt_jax.interop, found convert"),
        ([], "found nothing"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run(
    tiny_recipe, checkpoint_file, tmp_path, capsys, arguments, reason
):
    tokenizer = tiny_recipe.parent / "data" / "tokenizer.model"
    names = {"file": checkpoint_file[0], "recipe": tiny_recipe, "tmp": tmp_path}
    names["tokenizer"] = tokenizer
    code, out, err = status([argument.format(**names) for argument in arguments], capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: .*{reason}.*\n", err)
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    assert interop.main(["--help"]) == 0
    assert "interop import" in capsys.readouterr().out
