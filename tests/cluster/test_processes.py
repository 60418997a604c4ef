"""Several processes on this machine: the losses of one, its checkpoints, one line at an end."""

import contextlib
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sngpt_jax.cluster import processes
from sngpt_jax.run import checkpoint
from tests import tiny_run

slow = pytest.mark.slow

STATED = 60  # seconds within which docs/clusters.md promises the end


def free_port(ports: Iterable[int] = (0,)) -> int:
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return probe.getsockname()[1]
    raise AssertionError("no port is free")


def processes_of_options(num: int) -> list[tuple[list[str], dict[str, str]]]:
    """The options and the variables that make two processes those of a job of `num`."""
    options = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(num)]
    return [([*options, "--process-id", str(i)], {}) for i in range(2)]


def processes_of_slurm() -> list[tuple[list[str], dict[str, str]]]:
    """The same by Slurm, for two tasks on this node, with a proxy that leads nowhere."""
    lowest = 2**16 - 2**12
    ports = random.sample(range(lowest, 2**16), 100)  # those that follow from a job's number
    step = {
        "SLURM_JOB_ID": str(free_port(ports) - lowest),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "http_proxy": f"http://localhost:{free_port()}",
    }
    return [([], {**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]


def start(
    *command: object, differing: tuple[list[str], list[str]] = ([], []), by: Any = None
) -> list[subprocess.Popen[str]]:
    """Starts two processes of one job on a CPU device each."""
    return [
        subprocess.Popen(
            [*map(str, command), *own, *options],
            cwd=tiny_run.ROOT,
            env={**tiny_run.environment(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own, (options, variables) in zip(differing, by or processes_of_options(2), strict=True)
    ]


def finish(started: list[subprocess.Popen[str]], within: float = 300) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each, without gloo's own lines."""
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=within)
            ended.append((process.returncode, out, re.sub(r".*\[Gloo\].*\n?", "", err)))
    finally:
        for process in started:
            process.kill()
    return ended


def train(recipe: Path, directory: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    return start(*tiny_run.command("train", "--config", recipe, "--run-dir", directory, *arguments))


def wait_for_step(started: list[subprocess.Popen[str]], directory: Path, step: int) -> None:
    tiny_run.wait_for(started[0], directory / "metrics.jsonl", f'"step": {step}, "train_loss"')


def assert_same_losses(a: Path, b: Path) -> None:
    """Every loss that `b` has logged is in `a` too."""
    names = ("train_loss", "grad_norm", "val_loss", "swa_val_loss", "ema_val_loss")
    ours, theirs = (
        {(step, name): value for step, name, value in tiny_run.losses(run, names)} for run in (a, b)
    )
    assert len(theirs) == 20 + 20 + 3 + 2
    np.testing.assert_allclose([ours[key] for key in theirs], [*theirs.values()], rtol=0, atol=1e-5)


# ---------------------------------------- training


@slow
def test_a_run_stopped_in_one_of_two_processes_is_gone_on_with_by_one(
    tiny_recipe, tiny_trained, tmp_path
):
    run = tmp_path / "run"
    # or it ends before it is stopped
    often = ("--eval.every", 1, "--train.checkpoint-every", 2, "--train.max-seconds", 1000)
    two = train(tiny_recipe, run, *often, "--train.fsdp", 2)  # no process holds the state whole
    wait_for_step(two, run, 1)
    two[1].send_signal(signal.SIGTERM)
    (status, out, err), (other_status, other_out, other_err) = finish(two)
    assert (status, other_status) == (143, 143), err + other_err
    assert "2 x cpu in 2 processes" in out, out
    assert "to go on:" in err, err
    assert other_out == "" and "to go on" not in other_err
    saved = max(checkpoint.steps(run / "checkpoints"))
    assert saved == max(step for step, _, _ in tiny_run.losses(run, ("train_loss",)))
    done = tiny_run.run("train", "--config", tiny_recipe, "--run-dir", run, *often)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {saved}" in done.stdout
    assert_same_losses(run, tiny_trained)


@slow
def test_a_run_of_one_process_is_gone_on_with_by_two(tiny_recipe, tiny_trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_trained, run)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "00000020.json").unlink()
    done = finish(train(tiny_recipe, run, "--train.shard-optimizer", True))
    assert [status for status, _, _ in done] == [0, 0], done
    assert "resuming after step 10" in done[0][1]
    assert done[1][1] == ""
    assert_same_losses(run, tiny_trained)
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (run, tiny_trained))
    assert ours["swa_val_bpb"] == pytest.approx(theirs["swa_val_bpb"], abs=1e-5)


@slow
def test_two_processes_evaluate_as_one_does(tiny_trained):
    summary = json.loads((tiny_trained / "summary.json").read_text())
    options = ("--run", tiny_trained, "--tokens", 2048, "--json", "-")
    done = finish(start(*tiny_run.command("evaluate", *options)))
    assert [status for status, _, _ in done] == [0, 0], done
    assert json.loads(done[0][1])["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)
    assert done[1][1] == ""


# ---------------------------------------- the end of one

TOGETHER = """
import itertools, os, pathlib, sys, time
import jax, numpy as np, tyro
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.mesh import batch_placer, make_mesh

def main(argv):
    cli.log_to_stderr()
    with processes.joined(tyro.cli(processes.ProcessArguments, args=argv)):
        body(processes.index())
    return 0

def work():
    place, add = batch_placer(make_mesh()), jax.jit(lambda x: x.sum())
    for turn in itertools.count():
        assert float(add(place({"x": np.ones((2, 3))})["x"])) == 6
        if turn == 0: print("working", flush=True)
        time.sleep(0.1)

"""


def program(body: str, before: str = "") -> tuple[str, ...]:
    return sys.executable, "-c", f"{TOGETHER}\n{before}\ndef body(i):\n{body}\ncli.run(main)"


def wait_for_work(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        assert process.stdout.readline() == "working\n", process.stderr.read()


@slow
def test_a_process_that_is_killed_or_frozen_ends_the_others_with_a_line(tiny_recipe, tmp_path):
    """jax's guard aborts (SIGABRT) where no collective operation fails before."""
    trained = train(tiny_recipe, tmp_path / "run", "--train.steps", 10**6)
    assert processes.HEARTBEAT + 20 <= STATED
    soon = program("    work()", before="processes.HEARTBEAT = 10")
    without_0, frozen = start(*soon), start(*soon)
    done_to = {}
    lost = "error: another process is gone, and its own output may say why: "
    try:
        wait_for_step(trained, tmp_path / "run", 2)
        wait_for_work(without_0)
        wait_for_work(frozen)
        for job, victim, number, said in (
            (without_0, 0, signal.SIGKILL, f"process 1: {lost}|leader task was preempted/died"),
            (frozen, 1, signal.SIGSTOP, r"unhealthy \(stopped sending heartbeats\):\n1\n"),
            (trained, 1, signal.SIGKILL, f"^{lost}.*Gloo"),
        ):
            job[victim].send_signal(number)
            done_to[job[1 - victim]] = (said, time.monotonic())
        for survivor, (said, when) in done_to.items():
            _, err = survivor.communicate(timeout=STATED - (time.monotonic() - when))
            assert survivor.returncode in (5, -signal.SIGABRT), err
            assert re.search(said, err, re.MULTILINE) and "Traceback" not in err, err
    finally:
        for process in trained + without_0 + frozen:
            process.kill()
            process.communicate()


@slow
def test_an_error_in_one_process_ends_all_and_one_of_all_is_said_by_all():
    mistake = start(*program("    if i == 1: raise UserError('no such\\n folder')\n    work()"))
    bug = start(*program("    if i == 1: raise ValueError('a bug')\n    work()"))
    unlike = start(*program("    processes.check_alike({'version': '1', 'tokenizer': 'ab'[i]})"))
    devices = "jax.config.update('jax_num_cpu_devices', 1 + int(sys.argv[-1]))"
    uneven = start(*program("    pass", before=devices))
    for job, status, said in (
        (mistake, 2, "process 1: error: no such folder"),
        (bug, 1, "ValueError: a bug"),
    ):
        (other_status, _, other_err), (found, _, err) = finish(job, within=STATED)
        assert (found, err.splitlines()[-1]) == (status, said)
        assert ("Traceback" in err) == (status == 1)
        assert other_status == 5 and "error: another process is gone" in other_err.splitlines()[-1]
    for job, said in (
        (unlike, "tokenizer: a in process 0, b in process 1"),
        (uneven, "devices: 1 x cpu in process 0, 2 x cpu in process 1"),
    ):
        for status, _, err in finish(job, within=STATED):
            assert status == 2 and "Traceback" not in err, err
            assert f"error: {said}; start all processes with the same" in err


@slow
def test_processes_that_do_not_find_each_other_say_so_in_a_line():
    soon = program("    pass", before="processes.START = 3")
    elsewhere, taken = processes_of_options(2), processes_of_options(2)
    for options, _ in elsewhere:
        options[1] = options[1].replace("localhost", "no.such.host.invalid")
    port = taken[0][0][1].rpartition(":")[2]
    with socket.create_server(("", int(port))):
        jobs = {
            "not all of 3 processes came in 3 s": start(*soon, by=processes_of_options(3)),
            "--coordinator must name the node of process 0": start(*soon, by=elsewhere),
            "cannot be used: .*; choose another in --coordinator": start(*soon, by=taken)[:1],
        }
        for said, job in jobs.items():
            for status, _, err in finish(job, within=STATED):
                assert status == 2 and "Traceback" not in err, err
                assert re.search(f"error: .*{said}", err.splitlines()[-1]), err


@slow
def test_a_reader_that_leaves_is_no_error():
    job = start(*program("    if i == 0: raise BrokenPipeError\n    work()"))
    (status, _, err), _ = finish(job, within=STATED)
    assert status == 0 and "error" not in err and "Traceback" not in err


@slow
@pytest.mark.full
def test_processes_of_unlike_options_end(tiny_recipe, tiny_trained, tmp_path):
    modes = ["standard"], ["sliding"]
    evaluate = tiny_run.command("evaluate", "--run", tiny_trained, "--mode")
    recipe = ("--config", tiny_recipe, "--run-dir", tmp_path / "run")
    seeded = tiny_run.command("train", *recipe, "--train.seed")
    for command, differing, said in (
        (evaluate, modes, "mode: 'standard' in process 0, 'sliding' in process 1"),
        (seeded, (["1"], ["2"]), "train.seed: 1 in process 0, 2 in process 1"),
    ):
        for status, _, err in finish(start(*command, differing=differing)):
            assert status == 2
            assert f"error: {said}; start all processes with the same" in err


@slow
def test_what_process_0_says_goes(tmp_path):
    body = """
    from sngpt_jax.evaluation.tasks import run_tasks
    def can():
        if i: raise UserError('no file')
        return i
    assert processes.everywhere(lambda: i) == i
    try: processes.everywhere(can)
    except UserError as error: assert str(error) == ('no file' if i else 'process 1: no file')
    else: raise AssertionError
    assert processes.broadcast(lambda: [i, 'first' * 1000]) == [0, 'first' * 1000]
    folder = pathlib.Path(FOLDER)
    made = folder / 'made'
    with processes.first():
        if i == 0: time.sleep(1)
        assert made.exists() == (i == 1)
        made.touch()
    (text := folder / f'text {i}').write_text(f'a word {i}')
    def error(path):
        return run_tasks(None, {'lambada': path})['lambada']['error']
    assert 'none: cannot be read' in error(text if i else folder / 'none')
    assert 'task lambada' in error(text)
    for turn in range(40):
        seconds, signal = processes.agree(10 * i + turn + 0.1, 15 if i and turn > 5 else None)
        assert seconds == max(turn - 1, 0) + 0.1, 'what process 0 said in the call before'
        if signal: break
    print(turn, signal)
"""
    body = body.replace("FOLDER", repr(str(tmp_path)))
    done = finish(start(*program(body), by=processes_of_slurm()))
    assert [status for status, _, _ in done] == [0, 0], done
    assert [out for _, out, _ in done] == ["7 15\n"] * 2, "all hear of a signal in the same turn"


def test_an_end_takes_progress_off_the_terminal(monkeypatch):
    """Also where no interpreter's end would show the cursor again."""
    ended = []
    monkeypatch.setattr(processes.terminal, "clear", lambda: ended.append("cleared"))
    monkeypatch.setattr(processes.os, "_exit", lambda status: ended.append(status))
    processes._end(SystemExit(3))
    assert ended[:2] == ["cleared", 3]


def test_alone_a_process_decides_by_itself():
    with processes.joined(processes.ProcessArguments()), processes.first():
        assert (processes.index(), processes.count()) == (0, 1)
        assert processes.agree(3.0, None) == (3.0, None)
        assert processes.broadcast(lambda: 7) == 7
        assert processes.everywhere(lambda: 7) == 7
        processes.check_alike({"x": 1})
        processes.barrier()
