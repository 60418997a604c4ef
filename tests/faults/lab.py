"""A workspace with a tiny recipe, its uninterrupted results, and the processes that scenarios
start and break in it.
"""

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
    """`kills` is how often each kind of kill is tried, `thorough` whether what takes long is done
    too.
    """

    folder: Path
    kills: int
    rng: random.Random
    thorough: bool = True

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
        """Seconds that a training takes whose programs are compiled already."""
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
        return tiny_run.command(
            "train", "--config", self.recipe, "--run-dir", directory, *TRAINING, *more
        )

    def injected(self, faults: Sequence[object], command: Sequence[str]) -> list[str]:
        """`command` with `faults`, as `inject.py` takes them, in its process."""
        return [sys.executable, "-m", "tests.faults.inject", *map(str, faults), *command[2:]]

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Starts a command; what it prints goes to files, since nobody may be there to read a
        pipe.
        """
        out, err = (open(self.folder / f"std{name}", "w+") for name in ("out", "err"))  # noqa: SIM115 - the process keeps them
        settings = {
            "cwd": tiny_run.ROOT,
            "env": tiny_run.environment(),
            "stdout": out,
            "stderr": err,
            **options,
        }
        process = subprocess.Popen(command, text=True, **settings)  # type: ignore[call-overload]
        out.close()
        err.close()
        return process

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for the end of the process that was started last; one that hangs is killed and
        fails.
        """
        try:
            status = process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(
                f"{process.args} hangs: {(self.folder / 'stderr').read_text()}"
            ) from None
        return Ended(
            status,
            (self.folder / "stdout").read_text(),
            (self.folder / "stderr").read_text(errors="replace"),
        )

    def run(self, command: Sequence[str], **options: object) -> Ended:
        """Runs a command to its end."""
        return self.end(self.start(command, **options))

    def finished(self, directory: Path, *more: object) -> Path:
        """Trains into `directory`, or goes on there, to the recipe's end."""
        done = self.run(self.training(directory, *more))
        assert done.status == 0 and "Traceback" not in done.err, done.err
        return directory

    def goes_on_to_the_same(self, directory: Path) -> None:
        """The same command again ends with the parameters, optimizer state and logged losses of
        the reference.
        """
        tiny_run.assert_same_run(self.reference, self.finished(directory))

    # ---------------------------------------- moments

    def until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Returns once `condition` holds or the process has ended."""
        deadline = time.monotonic() + LONGEST
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline, "the moment did not come"
            time.sleep(0.0005)

    def kill_at(self, process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
        """SIGKILL once `condition` holds; whether it came before the process's own end."""
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
        message = (
            message.removeprefix("error: ")
            .replace(str(self.folder), "…")
            .replace(sys.executable, "python")
        )
        message = re.sub(r"\b[0-9a-f]{12,}\b", "<hash>", message)
        message = re.sub(r" \[[\d.]+\]:\d+", "", message)
        return " ".join(message.replace("|", "\\|").split())


Scenario = Callable[[Lab], Row]


def described(row: Row, lab: Lab) -> Row:
    """`row` as it is told."""
    return dataclasses.replace(row, message=lab.shown(row.message))


def unfinished_saves(directory: Path) -> list[str]:
    """The checkpoints of a run that have begun and are not recorded."""
    try:
        names = set(os.listdir(directory / "checkpoints"))
    except FileNotFoundError:
        return []
    return [
        name
        for name in names
        if not name.endswith(".json") and f"{name.split('.')[0]}.json" not in names
    ]


def steps_logged(directory: Path) -> int:
    """How many lines the run's metrics have."""
    try:
        return (directory / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
