"""SIGKILL at random moments: of trainings, preparations and exports, of one of two processes."""

import collections
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests import tiny_run
from tests.cluster import test_processes
from tests.faults.lab import PREPARATION, Lab, Row, steps_logged, unfinished_saves

IN_A_ROW = 4  # kills that one run meets at most before it may end
TWO = ("--train.steps", 60, "--train.checkpoint-every", 10)  # of a run of two processes
LONGEST_SILENCE = 100  # seconds that the one which is left may take to notice


def a_moment(lab: Lab, directory: Path) -> Callable[[], bool]:
    """A random moment of a training: while it starts, between steps, or while a checkpoint is
    being written.
    """
    kind, logged = lab.rng.choice(("starting", "training", "saving")), steps_logged(directory)
    if kind == "starting":
        return lab.after(lab.rng.uniform(0, 0.8 * lab.seconds))
    target = logged + lab.rng.randrange(1, 30)
    if kind == "training":
        return lambda: steps_logged(directory) >= target
    delay = lab.rng.uniform(0, 0.05)
    before = set(unfinished_saves(directory))

    def saving() -> bool:
        if (
            steps_logged(directory) < min(target, 36)
            or not set(unfinished_saves(directory)) - before
        ):
            return False
        time.sleep(delay)
        return True

    return saving


def of_trainings(lab: Lab) -> Row:
    """Each run meets up to four kills; then the same command is let to the end."""
    seen: collections.Counter[str] = collections.Counter()
    while (tried := seen.total()) < lab.kills:
        directory = lab.fresh("killed")
        for _ in range(min(IN_A_ROW, lab.kills - tried)):
            logged, old = steps_logged(directory), set(unfinished_saves(directory))
            if not lab.kill_at(lab.start(lab.training(directory)), a_moment(lab, directory)):
                break
            saving = set(unfinished_saves(directory)) - old
            during = (
                "saves" if saving else "steps" if steps_logged(directory) != logged else "starts"
            )
            seen[during] += 1
        lab.goes_on_to_the_same(directory)
        assert not list(directory.glob("**/*tmp*")), "something half written is left"
    return Row(
        "SIGKILL of a training, "
        + ", ".join(
            f"{seen[name]} during {name}" for name in ("starts", "steps", "saves") if seen[name]
        ),
        "The same command resumes from the last finished checkpoint. Parameters, optimizer state,"
        " averages and logged losses end equal to those of an uninterrupted run, bit for bit.",
        "resuming after step N",
        "137 in a shell",
        seen.total(),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for the lock."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != ".lock"
    }


def of_preparations(lab: Lab) -> Row:
    """Shards, byte corrections, tokenizer and manifest in the end are those of the undisturbed
    preparation.
    """
    source = lab.recipe.parent / "text.txt"

    def command(out: Path) -> list[str]:
        return tiny_run.command("prepare", "--source", source, "--out", out, *PREPARATION)

    start = time.monotonic()
    assert lab.run(command(lab.fresh("undisturbed"))).status == 0
    seconds, expected, tried = time.monotonic() - start, contents(lab.folder / "undisturbed"), 0
    while tried < lab.kills:
        out = lab.fresh("killed_data")
        for _ in range(min(IN_A_ROW, lab.kills - tried)):
            if not lab.kill_at(lab.start(command(out)), lab.after(lab.rng.uniform(0, seconds))):
                break
            tried += 1
        done = lab.run(command(out))
        assert done.status == 0, done.err
        assert contents(out) == expected
    return Row(
        "SIGKILL of a preparation of shards",
        "The same command resumes after the last whole shard. All files then equal those of an"
        " undisturbed preparation, byte for byte.",
        status="137 in a shell",
        tried=tried,
    )


def export_command(lab: Lab, folder: Path) -> list[str]:
    """The command that exports the reference run into `folder`."""
    return tiny_run.command(
        "export", "--run", lab.reference, "--out", folder / "m.sngpt", "--tokens", 2048
    )


def of_exports(lab: Lab) -> Row:
    """Artifact, program and tokenizer in the end are those of the undisturbed export, and nothing
    else is there.
    """
    start = time.monotonic()
    undisturbed = lab.fresh("exported")
    assert lab.run(export_command(lab, undisturbed)).status == 0
    seconds, tried = time.monotonic() - start, 0
    while tried < max(1, lab.kills // 4):
        folder = lab.fresh("killed_export")
        # the files appear at the end, so most moments are late ones
        moment = lab.after(seconds * lab.rng.triangular(0, 1, 0.9))
        hidden = lab.rng.random() < 0.5
        condition = (
            (lambda folder=folder: any(folder.glob(".export-*/m.sngpt"))) if hidden else moment
        )
        if lab.kill_at(lab.start(export_command(lab, folder)), condition):
            tried += 1
            assert not (folder / "m.sngpt").exists() or contents(folder) == contents(undisturbed), (
                "half an export is visible"
            )
        done = lab.run(export_command(lab, folder))
        assert done.status == 0, done.err
        assert contents(folder) == contents(undisturbed)
        assert len(list(folder.iterdir())) == 3
    return Row(
        "SIGKILL of an export",
        "No artifact exists before it is whole. The same command writes the same bytes and deletes"
        " the files that the killed export left.",
        status="137 in a shell",
        tried=tried,
    )


def of_one_of_two_processes(lab: Lab) -> Row:
    """The survivor ends by itself; both, started again, or one alone, go on."""
    directory = lab.fresh("two")
    started = test_processes.train(lab.recipe, directory, *TWO)
    try:
        test_processes.wait_for_step(started, directory, 12)
        started[1].send_signal(signal.SIGKILL)
        _, err = started[0].communicate(timeout=LONGEST_SILENCE)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert started[0].returncode == 5 and "Traceback" not in err, err
    (message,) = [line for line in err.splitlines() if "another process is gone" in line]
    done = test_processes.finish(test_processes.train(lab.recipe, directory, *TWO))
    assert [status for status, _, _ in done] == [0, 0], done
    whole = lab.fresh("two_whole")
    assert [
        status
        for status, _, _ in test_processes.finish(test_processes.train(lab.recipe, whole, *TWO))
    ] == [0, 0]
    tiny_run.assert_same_run(directory, whole)
    shutil.rmtree(whole)
    return Row(
        "one of two processes of a training is killed",
        "The other process ends within a minute. Both processes, started again, resume from the"
        " last finished checkpoint and reach the same parameters.",
        message,
        "5",
    )
