"""Whole runs: what a run leaves, and that nothing is lost when it is killed, stopped, diverges or
is moved.
"""

import dataclasses
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

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import file as config_file
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.tokenizer_training import train_sentencepiece
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import standard_windows
from sngpt_jax.run import checkpoint
from sngpt_jax.run.metrics import read_metrics
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
def test_a_stopped_run_saves_says_how_to_go_on_and_does(
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
    done = tiny_run.run(*again.split())
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {saved}" in done.stdout
    assert_same_run(tiny_trained, tmp_path / "run")


def test_a_run_resumes_on_another_number_of_devices(tiny_recipe, tiny_trained, tmp_path):
    process = start(tiny_recipe, tmp_path / "run")
    wait_for(process, tmp_path / "run" / "checkpoints" / "00000010.json")
    process.kill()
    process.communicate()
    done = train(tiny_recipe, tmp_path / "run", devices=8)
    assert done.returncode == 0, done.stderr
    assert "8 x cpu" in done.stdout
    ours, theirs = losses(tmp_path / "run"), losses(tiny_trained)
    assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
    np.testing.assert_allclose([e[2] for e in ours], [e[2] for e in theirs], atol=1e-5)


def test_eight_devices_train_the_same_losses(tiny_recipe, tiny_trained, tmp_path):
    done = train(tiny_recipe, tmp_path / "run", devices=8)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        [e[2] for e in losses(tmp_path / "run")], [e[2] for e in losses(tiny_trained)], atol=1e-5
    )


def test_a_broken_latest_checkpoint_falls_back(tiny_recipe, tiny_trained, tmp_path):
    shutil.copytree(tiny_trained, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    files = [
        path
        for path in (tmp_path / "run" / "checkpoints" / "00000020").rglob("*")
        if path.is_file()
    ]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    done = train(tiny_recipe, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10" in done.stdout
    (warning,) = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert "00000020" in warning
    assert "00000010" in warning
    assert_same_run(tiny_trained, tmp_path / "run")


def test_a_finished_run_prints_its_summary_again(tiny_recipe, tiny_trained):
    before = (tiny_trained / "metrics.jsonl").read_bytes()
    done = train(tiny_recipe, tiny_trained)
    assert done.returncode == 0
    assert "finished" in done.stdout
    assert (tiny_trained / "metrics.jsonl").read_bytes() == before


def test_another_configuration_in_the_same_directory_is_refused(tiny_recipe, tiny_trained):
    done = train(tiny_recipe, tiny_trained, "--optim.muon-lr", "0.01", "--train.steps", "30")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "optim.muon_lr: 0.04 -> 0.01" in done.stderr
    assert "train.steps: 20 -> 30" in done.stderr


def test_a_diverging_run_stops_with_the_step_and_the_last_good_checkpoint(tiny_recipe, tmp_path):
    """The rate grows until the run breaks; the checkpoint named is the newest whose own next loss
    was finite.
    """
    rates = (
        "--optim.scalar-lr",
        "1e30",
        "--optim.schedule",
        "constant",
        "--optim.swa-every",
        "0",
        "--optim.warmdown-fraction",
        "0",
    )
    warmup = (
        "--optim.warmup-steps",
        "4",
        "--train.checkpoint-every",
        "1",
        "--train.keep-checkpoints",
        "9",
    )
    done = train(tiny_recipe, tmp_path / "run", *rates, *warmup)
    assert done.returncode == 3
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Traceback" not in done.stderr
    finite = [
        r["step"]
        for r in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if r.get("train_loss") is not None
    ]
    assert re.search(r"step \d+", error)
    named = int(re.search(r"last good checkpoint is \S*/(\d+)", error)[1])
    assert named in checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert named + 1 in finite


def test_the_wall_clock_ends_the_schedule_and_the_run(tiny_recipe, tmp_path):
    arguments = (
        "--train.steps",
        "100000",
        "--train.max-seconds",
        "3",
        "--optim.warmdown-clock",
        "wall_clock",
    )
    done = train(
        tiny_recipe,
        tmp_path / "run",
        *arguments,
        "--eval.every",
        "0",
        "--train.checkpoint-every",
        "0",
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 3.0 <= summary["train_seconds"] < 5.0
    rates = [
        record["lr"]
        for record in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "lr" in record
    ]
    assert rates[0] == pytest.approx(0.04)
    assert rates[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates))


def test_a_profile_is_written(tiny_recipe, tmp_path):
    done = train(tiny_recipe, tmp_path / "run", "--train.profile-steps", "5:8")
    assert done.returncode == 0, done.stderr
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
    assert elapsed[-1] == pytest.approx(timed, rel=0.1, abs=0.1)
    assert (
        sum(record["val_seconds"] for record in records if "val_seconds" in record)
        > 0.1 * elapsed[-1]
    )
    scores = [record["val_loss"] for record in records if "val_loss" in record]
    assert len(scores) == 9
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_val_loss"] == min(
        scores
    )


def test_a_mistake_leaves_no_run_behind(tiny_recipe, tiny_trained, tmp_path):
    assert train(tiny_recipe, tmp_path / "run", "--data.dir", "/nonexistent").returncode == 2
    assert train(tiny_recipe, tmp_path / "run", devices=3).returncode == 2
    done = train(tiny_recipe, tmp_path / "run", "--train.steps", "2")
    assert done.returncode == 0, done.stderr


def test_a_run_killed_before_its_summary_does_not_validate_twice(
    tiny_recipe, tiny_trained, tmp_path
):
    shutil.copytree(tiny_trained, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert train(tiny_recipe, tmp_path / "run").returncode == 0
    assert losses(tmp_path / "run") == losses(tiny_trained)
    ours, theirs = (
        json.loads((d / "summary.json").read_text()) for d in (tmp_path / "run", tiny_trained)
    )
    assert ours["train_seconds"] == pytest.approx(theirs["train_seconds"], abs=0.05)
    for timed in ("train_seconds", "tok_per_s", "checkpoint"):
        del ours[timed], theirs[timed]
    assert ours == theirs


def test_another_tokenizer_in_the_run_is_refused(tiny_recipe, tiny_trained, tmp_path):
    shutil.copytree(tiny_trained, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    documents = (tiny_recipe.parent / "text.txt").read_text().split("\n<|endoftext|>\n")
    train_sentencepiece(
        documents[:100],
        tmp_path / "run" / "tokenizer.model",
        vocab_size=320,
        normalization="identity",
    )
    done = train(tiny_recipe, tmp_path / "run")
    assert done.returncode == 2
    assert "another tokenizer" in done.stderr
    done = tiny_run.run("evaluate", "--run", tmp_path / "run")
    assert done.returncode == 2
    assert "another tokenizer" in done.stderr


def test_log_every_and_shuffle_do_what_they_say(tiny_recipe, tiny_trained, tmp_path):
    done = train(tiny_recipe, tmp_path / "run", "--train.log-every", "7", "--data.shuffle", "True")
    assert done.returncode == 0, done.stderr
    ours = {
        (step, name): value
        for step, name, value in losses(tmp_path / "run")
        if name == "train_loss"
    }
    theirs = {(step, name): value for step, name, value in losses(tiny_trained)}
    assert [step for step, _ in ours] == [7, 14, 20]
    assert all(theirs[key] != value for key, value in ours.items())


def test_two_processes_cannot_train_in_one_directory(tiny_recipe, tmp_path):
    first = start(tiny_recipe, tmp_path / "run", "--train.steps", "1000")
    wait_for(first, tmp_path / "run" / "config.json")
    second = train(tiny_recipe, tmp_path / "run", "--train.steps", "1000")
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "another process is training in it" in second.stderr


def test_a_batch_that_does_not_divide_over_the_devices_is_refused_before_anything_compiles(
    tiny_recipe, tmp_path
):
    done = train(tiny_recipe, tmp_path / "run", devices=3)
    assert done.returncode == 2
    assert "do not divide over 3 devices" in done.stderr
    assert "compil" not in done.stdout


@pytest.mark.parametrize("implementation", ["cudnn", "pallas_triton"])
def test_an_implementation_for_other_devices_is_refused_before_there_is_a_run(
    tiny_recipe, tmp_path, implementation
):
    options = ("--model.attention", implementation, "--model.compute-dtype", "bfloat16")
    done = train(tiny_recipe, tmp_path / "run", *options)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == f"error: model.attention: {implementation} serves NVIDIA GPUs; the device is cpu; set it"
        " to auto"
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "config.json").exists()


def test_an_option_that_the_compiler_does_not_know_is_refused_before_there_is_a_run(
    tiny_recipe, tmp_path
):
    done = train(tiny_recipe, tmp_path / "run", "--train.xla-options", "xla_nonsense=1")
    assert done.returncode == 2
    assert "No such compile option: 'xla_nonsense'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "config.json").exists()


def test_evaluate_repeats_the_score_of_the_training_run(tiny_trained):
    summary = json.loads((tiny_trained / "summary.json").read_text())
    done = tiny_run.run("evaluate", "--run", tiny_trained, "--tokens", "2048", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert result["bpb"] == pytest.approx(summary["val_bpb"], rel=1e-6)
    assert (result["tokens"], result["windows"], result["step"]) == (2048, 64, 20)
    mesh = make_mesh(jax.devices()[:1])
    config, model = load(str(tiny_trained / "config.json")), load_model(tiny_trained, mesh)
    done = tiny_run.run(
        "evaluate",
        "--run",
        tiny_trained,
        "--tokens",
        "2048",
        "--fake-quantize",
        "--export.mlp-bits",
        "3",
        "--json",
    )
    coarse = json.loads(done.stdout)
    data = open_dataset(Path(config.data.dir), config.model.vocab_size)
    on_three_bits = Pass(
        quantize_variables(
            model.variables,
            dataclasses.replace(config, export=dataclasses.replace(config.export, mlp_bits=3)),
            data,
            mesh,
        ),
        make_eval_step(config.model, mesh),
        data.val,
        data.tokenizer.token_bytes(),
        mesh,
        standard_windows(len(data.val), config.data.seq_len, 2048),
        1024,
    ).score()
    assert coarse["fake_quantized"] and not result["fake_quantized"]
    assert coarse["loss"] == pytest.approx(on_three_bits.loss, rel=1e-5)
    assert abs(coarse["loss"] - result["loss"]) > 1e-4
    for name in ("swa", "ema"):
        done = tiny_run.run(
            "evaluate", "--run", tiny_trained, "--tokens", "2048", "--weights", name, "--json"
        )
        average = json.loads(done.stdout)
        assert average["bpb"] == pytest.approx(summary[f"{name}_val_bpb"], rel=1e-6)
        assert abs(average["bpb"] - result["bpb"]) > 1e-4
    other = json.loads(
        tiny_run.run(
            "evaluate", "--run", tiny_trained, "--tokens", "2048", "--json", devices=8
        ).stdout
    )
    assert other["loss"] == pytest.approx(result["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "/nonexistent"], "/nonexistent: not a run directory"),
        (["--run", "{run}", "--step", "7"], "available: 10, 20"),
        (["--run", "{run}", "--data", "/nonexistent"], "/nonexistent"),
        (["--run", "{run}", "--weights", "mean"], "swa"),
        (["--run", "{run}", "--export.mlp-bits", "5"], "change nothing without --fake-quantize"),
        (["--run", "{run}", "--export.mlp-bits", "9", "--fake-quantize"], "export.mlp_bits = 9"),
    ],
)
def test_evaluate_refuses_in_one_line(tiny_trained, arguments, said):
    done = tiny_run.run("evaluate", *(a.format(run=tiny_trained) for a in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
