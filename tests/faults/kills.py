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
    """A random moment of a training: while it starts, between steps, or during a save."""
    kind, logged = lab.rng.choice(("starting", "training", "saving")), steps_logged(directory)
    if kind == "starting":
        return lab.after(lab.rng.uniform(0, 0.8 * lab.seconds))
    target = logged + lab.rng.randrange(1, 30)
    if kind == "training":
        return lambda: steps_logged(directory) >= target
    delay = lab.rng.uniform(0, 0.05)
    before = unfinished_saves(directory)

    def saving() -> bool:
        if steps_logged(directory) < min(target, 36) or unfinished_saves(directory) <= before:
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
            logged, old = steps_logged(directory), unfinished_saves(directory)
            if not lab.kill_at(lab.start(lab.training(directory)), a_moment(lab, directory)):
                break
            if unfinished_saves(directory) - old:
                seen["saves"] += 1
            else:
                seen["steps" if steps_logged(directory) != logged else "starts"] += 1
        lab.goes_on_to_the_same(directory)
        assert not list(directory.glob("**/*tmp*")), "something half written is left"
    moments = [f"{seen[x]} during {x}" for x in ("starts", "steps", "saves") if seen[x]]
    return Row(
        f"SIGKILL of a training, {', '.join(moments)}",
        "The same command resumes from the last finished checkpoint. Parameters, optimizer state,"
        " averages and logged losses end equal to those of an uninterrupted run, bit for bit.",
        "resuming after step N",
        "137 in a shell",
        seen.total(),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for the lock."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    return {path.name: path.read_bytes() for path in files}


def prepare_command(lab: Lab, out: Path) -> list[str]:
    """The command that prepares the recipe's text into `out`."""
    source = lab.recipe.parent / "text.txt"
    return tiny_run.command("prepare", "--source", source, "--out", out, *PREPARATION)


def of_preparations(lab: Lab) -> Row:
    """All files in the end are those of an undisturbed preparation."""
    undisturbed, start = lab.fresh("undisturbed"), time.monotonic()
    assert lab.run(prepare_command(lab, undisturbed)).status == 0
    seconds, expected, tried = time.monotonic() - start, contents(undisturbed), 0
    while tried < lab.kills:
        out = lab.fresh("killed_data")
        command = prepare_command(lab, out)
        for _ in range(min(IN_A_ROW, lab.kills - tried)):
            if not lab.kill_at(lab.start(command), lab.after(lab.rng.uniform(0, seconds))):
                break
            tried += 1
        done = lab.run(command)
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
    out = folder / "m.sngpt"
    return tiny_run.command("export", "--run", lab.reference, "--out", out, "--tokens", 2048)


def of_exports(lab: Lab) -> Row:
    """All files in the end are those of an undisturbed export."""
    start = time.monotonic()
    undisturbed = lab.fresh("exported")
    assert lab.run(export_command(lab, undisturbed)).status == 0
    seconds, tried = time.monotonic() - start, 0
    while tried < max(1, lab.kills // 4):
        folder = lab.fresh("killed_export")
        # the files appear at the end, so most moments are late ones
        moment = lab.after(seconds * lab.rng.triangular(0, 1, 0.9))
        if lab.rng.random() < 0.5:
            moment = lambda folder=folder: any(folder.glob(".export-*/m.sngpt"))  # noqa: E731
        if lab.kill_at(lab.start(export_command(lab, folder)), moment):
            tried += 1
            whole = contents(folder) == contents(undisturbed) if folder.exists() else False
            assert whole or not (folder / "m.sngpt").exists(), "half an export is visible"
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
    """The survivor ends by itself. Both, started again, go on."""
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
    whole = lab.fresh("two_whole")
    for run in (directory, whole):
        done = test_processes.finish(test_processes.train(lab.recipe, run, *TWO))
        assert [status for status, _, _ in done] == [0, 0], done
    tiny_run.assert_same_run(directory, whole)
    shutil.rmtree(whole)
    return Row(
        "one of two processes of a training is killed",
        "The other process ends within a minute. Both processes, started again, resume from the"
        " last finished checkpoint and reach the same parameters.",
        message,
        "5",
    )
