"""A newcomer's first steps with one file of text: the commands that the commands print."""

import json
import random
import shlex
import subprocess
import sys

import pytest

from tests import tiny_run

pytestmark = pytest.mark.slow


def text(characters):
    """Sentences of invented words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(800)]
    lines, size = [], 0
    while size < characters:
        lines.append(" ".join(rng.choices(words, k=rng.randint(3, 12))).capitalize() + ".\n")
        size += len(lines[-1])
    return "".join(lines)


def test_a_file_of_text_becomes_a_scored_and_sampled_model(tmp_path):
    content = text(100_000)
    (tmp_path / "input.txt").write_text(content)

    def follow(command, *more):
        """What the command prints, and the commands that it prints to type next."""
        environment = tiny_run.environment()
        pipes = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
        done = subprocess.run([*shlex.split(command), *more], cwd=tmp_path, check=False, **pipes)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        following = [line.removeprefix("next: ") for line in lines if line.startswith("next: ")]
        return done.stdout, {line.split()[2].removeprefix("sngpt_jax."): line for line in following}

    python = shlex.quote(sys.executable)
    said, following = follow(f"{python} -m sngpt_jax.prepare --source input.txt --out d")
    cut = content.rindex("\n", 0, round(0.9 * len(content))) + 1
    assert f"the source is one document; after {cut:,} characters what follows is held out" in said
    said, following = follow(following["train"], "--train.steps", "4")
    summary = json.loads((tmp_path / "runs/d/summary.json").read_text())
    assert summary["val_bpb"] < summary["untrained_val_bpb"]
    said, _ = follow(following["evaluate"])
    assert "runs/d, step 4, final weights" in said and "bits/byte" in said
    said, _ = follow(following["sample"])
    assert len(said) > 20
