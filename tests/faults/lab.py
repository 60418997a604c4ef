"""A workspace with a tiny recipe, its uninterrupted results, and processes to break in it."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests import tiny_run

TRAINING = ("--train.steps", 40, "--train.checkpoint-every", 2, "--train.keep-checkpoints", 2)
PREPARATION = ("--vocab-size", 320, "--val-docs", 20, "--shard-tokens", 2000, "--workers", 2)
LONGEST = 300  # seconds that a process may take; one that takes longer hangs


@dataclass(frozen=True)
class Ended:
    """A process that has come to its end."""

    status: int
    out: str = field(repr=False)
    err: str

    @property
    def error(self) -> str:
        """Its only line of error; fails where there are several, or a traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        return lines[0]


@dataclass(frozen=True)
class Row:
    """A fault and what came of it."""

    fault: str
    happens: str
    message: str = ""
    status: str = ""
    tried: int = 1
    lost: str = "nothing"


@dataclass
class Lab:
    """What the scenarios share."""

    folder: Path
    kills: int  # of each kind
    rng: random.Random
    thorough: bool = True  # whether what takes long is done too

    @cached_property
    def recipe(self) -> Path:
        """The tiny recipe, its data prepared."""
        return tiny_run.make(self.folder)

    @property
    def data(self) -> Path:
        """The recipe's shards."""
        return self.recipe.parent / "data"

    @cached_property
    def reference(self) -> Path:
        """The run directory of an uninterrupted training."""
        return self.finished(self.folder / "reference")

    @cached_property
    def seconds(self) -> float:
        """The time of a training whose programs are compiled already."""
        assert self.reference.exists()
        start = time.monotonic()
        self.finished(self.fresh("timed"))
        return time.monotonic() - start

    def fresh(self, name: str) -> Path:
        """A path in the workspace with nothing there."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        return path

    def copy_of_reference(self, name: str) -> Path:
        """The reference run before its end was noted: the same command resumes it."""
        path = self.fresh(name)
        shutil.copytree(self.reference, path)
        (path / "summary.json").unlink()
        return path

    # ---------------------------------------- processes

    def training(self, directory: Path, *more: object) -> list[str]:
        """The command that trains into `directory`."""
        where = ("--config", self.recipe, "--run-dir", directory)
        return tiny_run.command("train", *where, *TRAINING, *more)

    def injected(self, faults: Sequence[object], command: Sequence[str]) -> list[str]:
        """`command` with `faults`, as `inject.py` takes them, in its process."""
        return [sys.executable, "-m", "tests.faults.inject", *map(str, faults), *command[2:]]

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Starts a command that prints to files: a pipe may have no reader."""
        with open(self.folder / "out", "w") as out, open(self.folder / "err", "w") as err:
            settings = {"cwd": tiny_run.ROOT, "env": tiny_run.environment(), "text": True}
            return subprocess.Popen(
                command, **{"stdout": out, "stderr": err, **settings, **options}
            )

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for the end of the process that was started last. A process that hangs fails."""
        try:
            status = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        out, err = ((self.folder / name).read_text(errors="replace") for name in ("out", "err"))
        assert status is not None, f"{process.args} hangs: {err}"
        return Ended(status, out, err)

    def run(self, command: Sequence[str], **options: object) -> Ended:
        """Runs a command to its end."""
        return self.end(self.start(command, **options))

    def finished(self, directory: Path, *more: object) -> Path:
        """Trains into `directory`, or goes on there, to the recipe's end."""
        done = self.run(self.training(directory, *more))
        assert done.status == 0 and "Traceback" not in done.err, done.err
        return directory

    def goes_on_to_the_same(self, directory: Path) -> None:
        """The same command again ends with the state and the losses of the reference."""
        tiny_run.assert_same_run(self.reference, self.finished(directory))

    # ---------------------------------------- moments

    def until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Returns once `condition` holds or the process has ended."""
        deadline = time.monotonic() + LONGEST
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline, "the moment did not come"
            time.sleep(0.0005)

    def kill_at(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
        """SIGKILL once `condition` holds; returns whether it came before the process's own end."""
        self.until(condition, process)
        process.kill()
        return self.end(process).status == -signal.SIGKILL

    def after(self, seconds: float) -> Callable[[], bool]:
        """A moment so many seconds from now."""
        deadline = time.monotonic() + seconds
        return lambda: time.monotonic() >= deadline

    # ---------------------------------------- what is told

    def shown(self, message: str) -> str:
        """`message` as the table has it: no paths of this machine, no addresses."""
        message = message.removeprefix("error: ").replace(str(self.folder), "…")
        message = message.replace(sys.executable, "python")
        message = re.sub(r"\b[0-9a-f]{12,}\b", "<hash>", message)
        message = re.sub(r" \[[\d.]+\]:\d+", "", message)
        return " ".join(message.replace("|", "\\|").split())


Scenario = Callable[[Lab], Row]


def described(row: Row, lab: Lab) -> Row:
    """`row` as it is told."""
    return dataclasses.replace(row, message=lab.shown(row.message))


def unfinished_saves(directory: Path) -> set[str]:
    """The checkpoints of a run that have begun and are not recorded."""
    try:
        names = set(os.listdir(directory / "checkpoints"))
    except FileNotFoundError:
        return set()
    saves = {name for name in names if not name.endswith(".json")}
    return {name for name in saves if f"{name.split('.')[0]}.json" not in names}


def steps_logged(directory: Path) -> int:
    """How many lines the run's metrics have."""
    try:
        return (directory / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
