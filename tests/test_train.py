"""Whole runs: what a run leaves, and that nothing is lost when it is killed, stopped, diverges or
is moved.
"""

import itertools
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from sngpt_jax import evaluate
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import changed
from sngpt_jax.config import file as config_file
from sngpt_jax.config.checks import validate
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import standard_windows
from sngpt_jax.run import checkpoint
from sngpt_jax.run.metrics import read_metrics
from sngpt_jax.training import compiler, trainer
from sngpt_jax.weights.quantized_model import quantize_variables
from sngpt_jax.weights.source import load_model
from tests import tiny_run
from tests.tiny_run import assert_same_run, losses, wait_for

pytestmark = pytest.mark.slow


def train(
    recipe: Path, directory: Path, *arguments: object, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    return tiny_run.run(
        "train", "--config", recipe, "--run-dir", directory, *arguments, devices=devices
    )


def start(recipe: Path, directory: Path, *arguments: object) -> subprocess.Popen[str]:
    return tiny_run.start("train", "--config", recipe, "--run-dir", directory, *arguments)


@pytest.fixture
def train_here(tiny_recipe, tmp_path, monkeypatch):
    """Trains the tiny recipe with changes in this process, into tmp_path / "run", and returns the
    exit status.
    """

    def train(directory=tmp_path / "run", devices=1, **changes):
        for name in ("keep_working_memory", "use_compilation_cache"):  # they change the process
            monkeypatch.setattr(compiler, name, lambda *args: None)
        some = jax.devices()[:devices]
        monkeypatch.setattr(trainer, "make_mesh", lambda fsdp: make_mesh(some, fsdp))
        config = validate(changed(load(str(tiny_recipe)), **changes))
        return trainer.run(config, directory, ProcessArguments(), quiet=False, again="again")

    return train


@pytest.fixture
def unfinished(tiny_trained, tmp_path):
    """A copy of the trained run that was killed before it wrote its summary."""
    directory = shutil.copytree(tiny_trained, tmp_path / "run")
    (directory / "summary.json").unlink()
    return directory


def test_a_run_leaves_what_it_should(tiny_recipe, tiny_trained):
    names = {path.name for path in tiny_trained.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "summary.json",
        "tokenizer.model",
    } <= names
    summary = json.loads((tiny_trained / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"]) == (20, 20 * 2048)
    assert summary["val_bpb"] < 0.95 * summary["untrained_val_bpb"]
    records = read_metrics(tiny_trained / "metrics.jsonl")
    steps = [record for record in records if "train_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert {"train_loss", "lr", "grad_norm", "tokens", "tok_per_s", "step_ms"} <= steps[0].keys()
    assert [record["lr"] for record in steps][-2:] == pytest.approx([0.04 * 2 / 15, 0.04 / 15])
    assert [record["step"] for record in records if "val_loss" in record] == [0, 10, 20]
    assert config_file.read(tiny_trained / "config.json") == load(str(tiny_recipe))


def test_a_killed_run_resumes_bit_for_bit(tiny_recipe, tiny_trained, tmp_path):
    process = start(tiny_recipe, tmp_path / "run")
    wait_for(process, tmp_path / "run" / "checkpoints" / "00000010.json")
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "summary.json").exists(), (
        "it was finished before it could be killed"
    )
    done = train(tiny_recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10" in done.stdout
    assert_same_run(tiny_trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_stopped_run_saves_and_says_how_to_go_on(
    tiny_recipe, tiny_trained, tmp_path, number, status
):
    process = start(tiny_recipe, tmp_path / "run")
    wait_for(process, tmp_path / "run" / "metrics.jsonl", "train_loss")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == status
    assert "Traceback" not in stderr
    (again,) = re.findall(r"to go on: \S+ -m sngpt_jax\.(.*)", stderr)
    saved = max(checkpoint.steps(tmp_path / "run" / "checkpoints"))
    assert saved > 0
    if number == signal.SIGTERM:  # all of them save alike, so one is resumed
        done = tiny_run.run(*again.split())
        assert done.returncode == 0, done.stderr
        assert f"resuming after step {saved}" in done.stdout
        assert_same_run(tiny_trained, tmp_path / "run")


def test_a_run_resumes_on_another_number_of_devices(train_here, tiny_trained, unfinished, capsys):
    shutil.rmtree(unfinished / "checkpoints" / "00000020")
    (unfinished / "checkpoints" / "00000020.json").unlink()
    assert train_here(devices=8) == 0
    said = capsys.readouterr().out
    assert "resuming after step 10" in said and "8 x cpu" in said
    ours, theirs = losses(unfinished), losses(tiny_trained)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    np.testing.assert_allclose([e[2] for e in ours], [e[2] for e in theirs], atol=1e-5)


def test_a_broken_latest_checkpoint_falls_back(tiny_recipe, tiny_trained, unfinished):
    latest = unfinished / "checkpoints" / "00000020"
    files = [path for path in latest.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    done = train(tiny_recipe, unfinished)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10" in done.stdout
    (warning,) = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert "00000020" in warning
    assert "00000010" in warning
    assert_same_run(tiny_trained, unfinished)


def test_a_finished_run_prints_its_summary_again(train_here, tiny_trained, capsys):
    before = (tiny_trained / "metrics.jsonl").read_bytes()
    assert train_here(tiny_trained) == 0
    assert "finished" in capsys.readouterr().out
    assert (tiny_trained / "metrics.jsonl").read_bytes() == before


def test_another_configuration_in_the_same_directory_is_refused(train_here, tiny_trained):
    with pytest.raises(UserError) as error:
        train_here(tiny_trained, optim={"muon_lr": 0.01}, train={"steps": 30})
    assert "optim.muon_lr: 0.04 -> 0.01" in str(error.value)
    assert "train.steps: 20 -> 30" in str(error.value)


def test_a_diverging_run_stops_with_the_step_and_the_last_good_checkpoint(
    train_here, tmp_path, capsys
):
    """The rate grows until the run breaks. The named checkpoint is the newest one whose next loss
    was finite.
    """
    rates = {"scalar_lr": 1e30, "schedule": "constant", "warmup_steps": 4}
    others = {"swa_every": 0, "warmdown_fraction": 0.0}
    kept = {"checkpoint_every": 1, "keep_checkpoints": 9}
    assert train_here(optim=rates | others, train=kept) == 3
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    finite = [record["step"] for record in records if record.get("train_loss") is not None]
    assert re.search(r"step \d+", error)
    named = int(re.search(r"last good checkpoint is \S*/(\d+)", error)[1])
    assert named in checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert named + 1 in finite


def test_the_wall_clock_ends_the_schedule_and_the_run(train_here, tmp_path):
    assert 0 == train_here(
        train={"steps": 100_000, "max_seconds": 3.0, "checkpoint_every": 0},
        optim={"warmdown_clock": "wall_clock"},
        eval={"every": 0},
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 3.0 <= summary["train_seconds"] < 5.0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    rates = [record["lr"] for record in records if "lr" in record]
    assert rates[0] == pytest.approx(0.04)
    assert rates[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_a_profile_is_written(train_here, tmp_path):
    assert train_here(train={"profile_steps": "5:8"}) == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    numbers = {dict(event.stats).get("step_num") for event in events if event.name == "train"}
    assert numbers == {5, 6, 7, 8}


def test_the_clock_goes_on_in_a_resumed_run_and_leaves_out_validation(tiny_recipe, tmp_path):
    arguments = ("--train.steps", "40", "--train.max-seconds", "1000", "--eval.every", "5")
    process = start(tiny_recipe, tmp_path / "run", *arguments)
    wait_for(process, tmp_path / "run" / "checkpoints" / "00000020.json")
    process.kill()
    process.communicate()
    assert train(tiny_recipe, tmp_path / "run", *arguments).returncode == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    elapsed = [record["elapsed_seconds"] for record in records if "elapsed_seconds" in record]
    assert elapsed == sorted(elapsed)
    timed = sum(record["step_ms"] for record in records if "step_ms" in record) / 1e3
    validating = sum(record["val_seconds"] for record in records if "val_seconds" in record)
    assert elapsed[-1] == pytest.approx(timed, abs=validating / 2)
    scores = [record["val_loss"] for record in records if "val_loss" in record]
    assert len(scores) == 9
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_val_loss"] == min(scores)


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        ({"data": {"dir": "/nonexistent"}}, 1, "/nonexistent"),
        ({}, 3, "do not divide over 3 devices"),
        (
            {"model": {"attention": "cudnn", "compute_dtype": "bfloat16"}},
            1,
            "model.attention: cudnn serves NVIDIA GPUs; the device is cpu; set it to auto",
        ),
        (
            {"model": {"attention": "pallas_triton", "compute_dtype": "bfloat16"}},
            1,
            "model.attention: pallas_triton serves NVIDIA GPUs; the device is cpu; set it to auto",
        ),
        (
            {"train": {"xla_options": ("xla_nonsense=1",)}},
            1,
            "No such compile option: 'xla_nonsense'",
        ),
    ],
)
def test_a_mistake_leaves_no_run_behind(train_here, tmp_path, capsys, changes, devices, said):
    with pytest.raises(UserError) as error:
        train_here(devices=devices, **changes)
    assert said in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()
    assert devices == 1 or "compil" not in capsys.readouterr().out
    assert train_here(train={"steps": 2}) == 0


def test_a_run_killed_before_its_summary_does_not_validate_twice(
    train_here, tiny_trained, unfinished
):
    assert train_here() == 0
    assert losses(unfinished) == losses(tiny_trained)
    ours, theirs = (
        json.loads((d / "summary.json").read_text()) for d in (unfinished, tiny_trained)
    )
    assert ours["train_seconds"] == pytest.approx(theirs["train_seconds"], abs=0.05)
    for timed in ("train_seconds", "tok_per_s", "checkpoint"):
        del ours[timed], theirs[timed]
    assert ours == theirs


def test_another_tokenizer_in_the_run_is_refused(tiny_recipe, train_here, unfinished):
    documents = (tiny_recipe.parent / "text.txt").read_text().split("\n<|endoftext|>\n")
    train_sentencepiece(
        documents[:100], unfinished / "tokenizer.model", vocab_size=320, normalization="identity"
    )
    for command in (train_here, lambda: evaluate.main(["--run", str(unfinished)])):
        with pytest.raises(UserError, match="another tokenizer"):
            command()


def test_log_every_and_shuffle_do_what_they_say(train_here, tiny_trained, tmp_path):
    assert train_here(train={"log_every": 7}, data={"shuffle": True}) == 0
    ours, theirs = (
        {step: value for step, name, value in losses(run) if name == "train_loss"}
        for run in (tmp_path / "run", tiny_trained)
    )
    assert list(ours) == [7, 14, 20]
    assert all(abs(theirs[step] - value) > 1e-3 for step, value in ours.items())


def test_two_processes_cannot_train_in_one_directory(tiny_recipe, train_here, tmp_path):
    first = start(tiny_recipe, tmp_path / "run", "--train.steps", "1000")
    wait_for(first, tmp_path / "run" / "config.json")
    try:
        with pytest.raises(UserError, match="another process is training in it"):
            train_here(train={"steps": 1000})
    finally:
        first.kill()
        first.communicate()


def test_evaluate_repeats_the_score_of_the_training_run(tiny_trained, capsys):
    def evaluated(*arguments):
        given = ["--run", str(tiny_trained), "--tokens", "2048", "--json", *arguments]
        assert evaluate.main(given) == 0
        return json.loads(capsys.readouterr().out)

    summary = json.loads((tiny_trained / "summary.json").read_text())
    result = evaluated()
    assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert result["bpb"] == pytest.approx(summary["val_bpb"], rel=1e-6)
    assert (result["tokens"], result["windows"], result["step"]) == (2048, 64, 20)
    for name in ("swa", "ema"):
        average = evaluated("--weights", name)
        assert average["bpb"] == pytest.approx(summary[f"{name}_val_bpb"], rel=1e-6)
        assert abs(average["bpb"] - result["bpb"]) > 1e-4

    coarse = evaluated("--fake-quantize", "--export.mlp-bits", "3")
    mesh = make_mesh(jax.devices()[:1])
    config, model = load(str(tiny_trained / "config.json")), load_model(tiny_trained, mesh)
    data = open_dataset(Path(config.data.dir), config.model.vocab_size)
    three_bits = changed(config, export={"mlp_bits": 3})
    wanted = Pass(
        quantize_variables(model.variables, three_bits, data, mesh),
        make_eval_step(config.model, mesh),
        data.val,
        data.tokenizer.token_bytes(),
        mesh,
        standard_windows(len(data.val), config.data.seq_len, 2048),
        1024,
    ).score()
    assert coarse["fake_quantized"] and not result["fake_quantized"]
    assert coarse["loss"] == pytest.approx(wanted.loss, rel=1e-5)
    assert abs(coarse["loss"] - result["loss"]) > 1e-4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "/nonexistent"], "/nonexistent: not a run directory"),
        (["--run", "{run}", "--step", "7"], "available: 10, 20"),
        (["--run", "{run}", "--data", "/nonexistent"], "/nonexistent"),
        (["--run", "{run}", "--export.mlp-bits", "5"], "change nothing without --fake-quantize"),
        (["--run", "{run}", "--export.mlp-bits", "9", "--fake-quantize"], "export.mlp_bits = 9"),
    ],
)
def test_evaluate_refuses_in_one_line(tiny_trained, arguments, said):
    with pytest.raises(UserError, match=said) as error:
        evaluate.main([argument.format(run=tiny_trained) for argument in arguments])
    assert "\n" not in str(error.value)


def test_evaluate_names_the_weights_that_there_are(tiny_trained, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--run", str(tiny_trained), "--weights", "mean"])
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert "swa" in said.out + said.err
