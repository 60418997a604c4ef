"""Several processes on this machine: the same losses as one, each other's checkpoints, one line
when one of them ends.
"""

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
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sngpt_jax.cluster import processes
from sngpt_jax.run import checkpoint
from sngpt_jax.run.metrics import read_metrics
from tests import tiny_run

slow = pytest.mark.slow

STATED = 60  # seconds within which docs/clusters.md promises the end


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def slurm_port() -> int:
    """A free port among those that follow from the number of a Slurm job."""
    for port in random.sample(range(2**16 - 2**12, 2**16), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise AssertionError("no port is free")


def processes_of_options(num: int) -> list[tuple[list[str], dict[str, str]]]:
    """The options and the variables that make two processes those of a job of `num`."""
    options = [
        "--coordinator",
        f"localhost:{free_port()}",
        "--num-processes",
        str(num),
        "--process-id",
    ]
    return [([*options, str(i)], {}) for i in range(2)]


def processes_of_slurm() -> list[tuple[list[str], dict[str, str]]]:
    """The same by Slurm, for two tasks on this node, on a cluster with a proxy that leads nowhere."""
    step = {
        "SLURM_JOB_ID": str(slurm_port() - (2**16 - 2**12)),
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
    """Starts two processes of one job, on a CPU device each; their programs are quick to compile."""
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    return [
        subprocess.Popen(
            [*map(str, command), *own, *options],
            cwd=tiny_run.ROOT,
            env={**tiny_run.environment(), "XLA_FLAGS": flags, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own, (options, variables) in zip(differing, by or processes_of_options(2), strict=True)
    ]


def finish(started: list[subprocess.Popen[str]], within: float = 300) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each; gloo's own lines left out."""
    try:
        outputs = [process.communicate(timeout=within) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        (
            process.returncode,
            out,
            "".join(line for line in err.splitlines(True) if "[Gloo]" not in line),
        )
        for process, (out, err) in zip(started, outputs, strict=True)
    ]


def train(recipe: Path, directory: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    return start(*tiny_run.command("train", "--config", recipe, "--run-dir", directory, *arguments))


def wait_for_step(started: list[subprocess.Popen[str]], directory: Path, step: int) -> None:
    tiny_run.wait_for(started[0], directory / "metrics.jsonl", f'"step": {step}, "train_loss"')


def losses(directory: Path) -> dict[tuple[int, str], float]:
    return {
        (record["step"], name): record[name]
        for record in read_metrics(directory / "metrics.jsonl")
        for name in ("train_loss", "grad_norm", "val_loss", "swa_val_loss", "ema_val_loss")
        if name in record
    }


def assert_same_losses(a: Path, b: Path) -> None:
    """Every loss that `b` has logged is in `a` too."""
    ours, theirs = losses(a), losses(b)
    assert len(theirs) == 20 + 20 + 3 + 2
    np.testing.assert_allclose([ours[key] for key in theirs], [*theirs.values()], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- training


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
    assert "2 x cpu of 2 processes" in out and "to go on:" in err
    assert other_out == "" and "to go on" not in other_err
    saved = max(checkpoint.steps(run / "checkpoints"))
    assert saved == max(step for step, name in losses(run) if name == "train_loss")
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
    done = finish(
        start(*tiny_run.command("evaluate", "--run", tiny_trained, "--tokens", 2048, "--json", "-"))
    )
    assert [status for status, _, _ in done] == [0, 0], done
    assert json.loads(done[0][1])["loss"] == pytest.approx(summary["val_loss"], abs=1e-5)
    assert done[1][1] == ""


# ---------------------------------------------------------------------------------------------- the end of one

TOGETHER = """
import itertools, sys, time
import jax, numpy as np, tyro
from sngpt_jax import cli, processes
from sngpt_jax.parallel import batch_placer, make_mesh
from sngpt_jax.cli import UserError

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


def program(body: str) -> tuple[str, ...]:
    return sys.executable, "-c", f"{TOGETHER}\ndef body(i):\n{body}\ncli.run(main)"


def wait_for_now(process: subprocess.Popen[str]) -> None:
    """Returns when `process` is about to fail."""
    assert process.stdout and process.stdout.readline() == "now\n", (
        process.stderr and process.stderr.read()
    )


def wait_for_work(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        assert process.stdout and process.stdout.readline() == "working\n", (
            process.stderr and process.stderr.read()
        )


@slow
def test_a_process_that_is_killed_or_frozen_ends_the_others_with_a_line(tiny_recipe, tmp_path):
    trained = train(tiny_recipe, tmp_path / "run", "--train.steps", 10**6)
    without_0, frozen = (start(*program("    work()")) for _ in range(2))
    done_to = {}
    try:
        wait_for_step(trained, tmp_path / "run", 2)
        wait_for_work(without_0)
        wait_for_work(frozen)
        for job, victim, number in (
            (without_0, 0, signal.SIGKILL),
            (frozen, 1, signal.SIGSTOP),
            (trained, 1, signal.SIGKILL),
        ):
            job[victim].send_signal(number)
            done_to[job[1 - victim]] = (victim, time.monotonic())
        for survivor, (victim, when) in done_to.items():
            _, err = survivor.communicate(timeout=STATED - (time.monotonic() - when))
            assert survivor.returncode == 5, err
            assert "Traceback" not in err
            *lost, line = [line for line in err.splitlines() if "error" in line.lower()]
            assert f"error: process {victim} has given no sign of life" in line
            assert (
                all("to hear whether another process has ended" in line for line in lost)
                and len(lost) <= 1
            )
    finally:
        for process in trained + without_0 + frozen:
            process.kill()
            process.communicate()


@slow
def test_what_one_process_cannot_do_is_said_by_all_in_a_line_and_soon():
    memory = "RESOURCE_EXHAUSTED: Out of memory"
    mistake = start(
        *program(
            "    if i == 1: print('now', flush=True); raise UserError('no such\\n folder')\n   "
            " work()"
        )
    )
    no_room = start(
        *program(
            "    if i == 0: print('now', flush=True); raise"
            f" jax.errors.JaxRuntimeError({memory!r})\n    work()"
        )
    )
    unlike = start(*program("    processes.check_alike({'version': '1', 'tokenizer': 'ab'[i]})"))
    wait_for_now(mistake[1])
    (status, _, err), (other_status, _, other_err) = finish(mistake, within=15)
    assert (status, other_status) == (2, 2)
    assert err.splitlines()[-1] == "error: process 1 has ended: no such folder"
    assert other_err.splitlines()[-1] == "process 1: error: no such folder"
    wait_for_now(no_room[0])
    (status, _, err), (other_status, _, other_err) = finish(no_room, within=15)
    assert (status, other_status) == (1, 1)
    assert "Traceback" in err and "Traceback" not in other_err
    assert (
        other_err.splitlines()[-1]
        == f"process 1: error: process 0 has ended: JaxRuntimeError: {memory}"
    )
    for status, _, err in finish(unlike):
        assert status == 2
        assert (
            "error: tokenizer: a in process 0, b in process 1; start all processes with the same"
            in err
        )
        assert "Traceback" not in err


@slow
def test_processes_that_do_not_find_each_other_say_so_in_a_line():
    soon = TOGETHER + "processes.START = 3\ndef body(i): pass\ncli.run(main)"
    short_of_one = start(sys.executable, "-c", soon, by=processes_of_options(3))
    elsewhere = processes_of_options(2)
    for options, _ in elsewhere:
        options[1] = options[1].replace("localhost", "no.such.host.invalid")
    for status, _, err in finish(start(sys.executable, "-c", soon, by=elsewhere), within=60):
        assert status == 2
        assert (
            "error: no.such.host.invalid:" in err
            and "--coordinator is to name process 0's node" in err
        )
        assert "Traceback" not in err
    for status, _, err in finish(short_of_one, within=60):
        assert status == 2
        assert "waiting for all 3 processes" in err
        assert "error: not all of 3 processes came in 3 s" in err.splitlines()[-1]
        assert "Traceback" not in err


@slow
def test_a_reader_that_leaves_is_no_error():
    for status, _, err in finish(
        start(*program("    if i == 0: raise BrokenPipeError\n    work()"))
    ):
        assert status == 0
        assert "error" not in err and "Traceback" not in err


@slow
def test_processes_of_unlike_options_end(tiny_recipe, tiny_trained, tmp_path):
    evaluate = tiny_run.command("evaluate", "--run", tiny_trained, "--mode")
    seeded = tiny_run.command(
        "train", "--config", tiny_recipe, "--run-dir", tmp_path / "run", "--train.seed"
    )
    for job, said in (
        (
            start(*evaluate, differing=(["standard"], ["sliding"])),
            "mode: 'standard' in process 0, 'sliding' in process 1",
        ),
        (start(*seeded, differing=(["1"], ["2"])), "train.seed: 1 in process 0, 2 in process 1"),
    ):
        for status, _, err in finish(job):
            assert status == 2
            assert f"error: {said}; start all processes with the same" in err


@slow
def test_what_process_0_says_goes(tmp_path):
    body = """
    import pathlib
    from sngpt_jax.evaluation.tasks import run_tasks
    def can():
        if i: raise UserError('no file')
        return i
    assert processes.everywhere(lambda: i) == i
    try: processes.everywhere(can)
    except UserError as error: assert str(error) == ('no file' if i else 'process 1: no file')
    else: raise AssertionError
    assert processes.broadcast(lambda: [i, 'first']) == [0, 'first']
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
        seconds, signal = processes.agree(10 * i + turn, 15 if i and turn > 5 else None)
        assert seconds == turn
        if signal: break
        time.sleep(0.1)
    print(turn, signal)
"""
    done = finish(
        start(*program(body.replace("FOLDER", repr(str(tmp_path)))), by=processes_of_slurm())
    )
    assert [status for status, _, _ in done] == [0, 0], done
    assert done[0][1] == done[1][1], "a signal at process 1 is told to both in the same turn"
    assert re.fullmatch(r"\d+ 15\n", done[0][1]), done[0][1]


def test_alone_a_process_decides_by_itself():
    with processes.joined(processes.ProcessArguments()), processes.first():
        assert (processes.index(), processes.count()) == (0, 1)
        assert processes.agree(3.0, None) == (3.0, None)
        assert processes.broadcast(lambda: 7) == 7
        assert processes.everywhere(lambda: 7) == 7
        processes.check_alike({"x": 1})
        processes.barrier()
