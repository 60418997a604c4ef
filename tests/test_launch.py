"""launch.sh: what it refuses, what it runs, and that an environment once made is not made again."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in
*"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what launch.sh looks at, and a python3 that writes down how it is called instead of running."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "sngpt_jax", root / "sngpt_jax", ignore=shutil.ignore_patterns("__pycache__"))
    python = tmp_path / "python3"
    python.write_text(FAKE_PYTHON.format(log=tmp_path / "log"))
    python.chmod(0o755)
    return root


def launch(checkout, *arguments, path=""):
    """Runs launch.sh with the recording python3; returns what it did, a line a call."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    env = {"PATH": f"{path}:/usr/bin:/bin".lstrip(":"), "PYTHON": str(checkout.parent / "python3")}
    done = subprocess.run([checkout / "launch.sh", *arguments], env=env, cwd=checkout.parent, capture_output=True, text=True)
    return done, log.read_text().splitlines() if log.exists() else []


def test_first_call_installs_and_the_second_only_runs(checkout):
    done, calls = launch(checkout, "train", "--config", "a b.py")
    assert done.returncode == 0, done.stderr
    assert any("-m venv" in call for call in calls)
    assert any(call.endswith(f"--editable {checkout}") for call in calls)
    assert calls[-1].endswith("-m sngpt_jax.train --config a b.py")
    done, calls = launch(checkout, "prepare", "--source", "stdlib")
    assert [call.partition(" ")[2] for call in calls] == ["-m sngpt_jax.data.prepare --source stdlib"]


def test_test_adds_its_extra_and_a_changed_pyproject_installs_again(checkout):
    launch(checkout, "train")
    _, calls = launch(checkout, "test", "-k", "x")
    assert any(call.endswith(f"--editable {checkout}[test]") for call in calls)
    assert calls[-1].endswith("-m pytest -k x")
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    _, calls = launch(checkout, "test")
    assert any("--editable" in call for call in calls)


def test_an_nvidia_gpu_brings_the_cuda_extra(checkout):
    tools = checkout.parent / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3'\n")
    (tools / "nvidia-smi").chmod(0o755)
    _, calls = launch(checkout, "train", path=str(tools))
    assert any(call.endswith(f"--editable {checkout}[cuda13]") for call in calls)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage"),
        (["trian"], "unknown command 'trian'"),
        (["train evaluate"], "unknown command"),
        (["bench"], "no command 'bench'"),
    ],
)
def test_what_it_cannot_run_is_one_line_and_status_2(checkout, arguments, said):
    done, calls = launch(checkout, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not calls


def test_a_python_that_is_too_old_is_named(checkout):
    (checkout.parent / "python3").write_text("#!/bin/sh\nexit 1\n")
    done, _ = launch(checkout, "train")
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
