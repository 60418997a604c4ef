"""What a run was started with is kept, start by start."""

import json
import platform
import socket
import subprocess

import jax
import pytest

import sngpt_jax
from sngpt_jax.run import environment


def test_every_start_is_a_line(tmp_path):
    environment.record(tmp_path, 0)
    environment.record(tmp_path, 7)
    lines = (tmp_path / "environment.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    expected = {"step": 0, "jax": jax.__version__, "python": platform.python_version()}
    expected |= {"sngpt_jax": sngpt_jax.__version__, "device": jax.devices()[0].device_kind}
    assert first == first | expected | {"devices": 8, "processes": 1}
    assert second["step"] == 7
    assert first["time"] <= second["time"] and first["time"].endswith("+00:00")


def test_of_very_many_starts_the_first_and_the_latest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "MOST_STARTS", 4)
    for step in range(7):
        environment.record(tmp_path, step)
    assert [start["step"] for start in environment.read(tmp_path)] == [0, 4, 5, 6]


def test_the_machine_is_not_named(tmp_path, monkeypatch):
    for module, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda: pytest.fail("asked for the machine's name"))
    environment.record(tmp_path, 0)


def test_the_program_is_the_whole_package(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(environment, "git_commit", lambda folder: asked.append(folder))
    environment.record(tmp_path, 0)
    (package,) = asked
    assert (package / "training" / "step.py").is_file()
    assert (package / "../kernels" / "sngpt_kernels").is_dir()


def git(folder, *arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *name, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_program(tmp_path):
    package = tmp_path / "package"
    (tmp_path / "kernels").mkdir()
    package.mkdir()
    assert environment.git_commit(package) is None  # no repository at all
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "first")
    (package / "__init__.py").write_text("")
    # in a repository that does not keep it, such as an installed wheel's
    assert environment.git_commit(package) is None
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "second")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment.git_commit(package) == head
    (tmp_path / "other").write_text("changed")
    (package / "new.py").write_text("")
    assert environment.git_commit(package) == head  # neither is the program's
    (package / "__init__.py").write_text("changed")
    assert environment.git_commit(package) == f"{head}+changes"
