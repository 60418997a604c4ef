"""launch.sh: what it refuses, what it runs, and that an environment once made is not made again."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in
*"-m venv"*)
  for last; do :; done
  rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
esac
"""


def write_executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A copy of what launch.sh looks at, and a python3 that only writes down how it is called."""
    root, tools = tmp_path / "a checkout", tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    # a machine without a GPU, whatever this one has
    write_executable(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(
        ROOT / "sngpt_jax", root / "sngpt_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    write_executable(tmp_path / "python3", FAKE_PYTHON.format(log=tmp_path / "log"))
    return root


def environment(checkout):
    folder = checkout.parent
    return {"PATH": f"{folder / 'tools'}:/usr/bin:/bin", "PYTHON": str(folder / "python3")}


def launch(checkout, *arguments):
    """Runs launch.sh with the recording python3; returns what it did, a line a call."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    command = [checkout / "launch.sh", *arguments]
    done = subprocess.run(command, env=environment(checkout), capture_output=True, text=True)
    return done, log.read_text().splitlines() if log.exists() else []


def installed(calls):
    """What pip was asked to install, a call each."""
    return [call.partition("--editable ")[2] for call in calls if "pip install" in call]


def test_first_call_installs_and_the_second_only_runs(checkout):
    done, calls = launch(checkout, "train", "--config", "a b.py")
    assert done.returncode == 0, done.stderr
    assert any("-m venv" in call for call in calls)
    assert installed(calls) == [str(checkout)]
    assert calls[-1].endswith("-m sngpt_jax.train --config a b.py")
    done, calls = launch(checkout, "prepare", "--source", "stdlib")
    assert installed(calls) == []
    assert calls[-1].endswith("-m sngpt_jax.prepare --source stdlib")


def test_extras_are_installed_when_a_command_needs_them(checkout):
    launch(checkout, "train")
    _, calls = launch(checkout, "test", "-k", "x")
    assert installed(calls) == [f"{checkout}[test]"]
    assert calls[-1].endswith("-m pytest -k x")
    _, calls = launch(checkout, "test")
    assert installed(calls) == [] and calls[-1].endswith("-m pytest -n auto --dist loadfile")
    _, calls = launch(checkout, "prepare", "--source", "golf:sp1024")
    assert installed(calls) == [f"{checkout}[hub]"]
    _, calls = launch(checkout, "docs", "build", "--strict")
    assert installed(calls) == [f"{checkout}[docs]"]
    assert calls[-1].endswith("-m mkdocs build --strict")


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("prepare --source stdlib", ""),
        ("prepare --source stdlib --executor processes", ""),
        ("prepare --source stdlib --executor local --workers 2", "datatrove"),
        ("prepare --source stdlib --executor=slurm", "datatrove"),
        ("evaluate --run x", ""),
        ("evaluate --run x --ngram exact", "eval"),
        ("evaluate --run x --ngram=tilt", "eval"),
        ("evaluate --run x --ngram none", ""),
        ("audit --run x", ""),
        ("audit --run x --ngram exact", "eval"),
        ("evaluate --run x --ngram-memory 2", ""),
        ("evaluate --run x --tasks lambada=ab.txt,hellaswag=c=d.jsonl", "eval"),
        ("evaluate --run x --tasks=squad=dev-v2.0.json --task-limit 5", "eval"),
        ("evaluate --run x --tasks piqa --json", "eval"),
        ("evaluate --run x --data exact --json", ""),
        ("plan --config quickstart", ""),
        ("plan --config quickstart --topology h100x8", "cuda13"),
        ("plan --kernels xsa", "cuda13"),
        ("bench --config quickstart --against none", ""),
        ("bench --config quickstart --against torch", "torch"),
        ("bench --config quickstart --against=torch", "torch"),
    ],
)
def test_options_bring_the_extras_that_they_need(checkout, line, extra):
    done, calls = launch(checkout, *line.split())
    assert done.returncode == 0, done.stderr
    assert installed(calls) == [f"{checkout}[{extra}]" if extra else str(checkout)]


def test_an_nvidia_gpu_brings_the_cuda_extra(checkout):
    answer = "#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3'\n"
    write_executable(checkout.parent / "tools/nvidia-smi", answer)
    assert installed(launch(checkout, "train")[1]) == [f"{checkout}[cuda13]"]


def test_a_changed_pyproject_and_a_moved_checkout_install_again(checkout):
    launch(checkout, "train")
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    assert installed(launch(checkout, "train")[1]) == [str(checkout)]
    moved = checkout.rename(checkout.parent / "moved")
    assert installed(launch(moved, "train")[1]) == [str(moved)]


def test_an_environment_whose_python_is_gone_is_made_anew(checkout):
    launch(checkout, "train")
    (checkout / ".venv" / "bin" / "python").unlink()
    done, calls = launch(checkout, "train")
    assert done.returncode == 0, done.stderr
    assert any("-m venv" in call for call in calls)
    assert installed(calls) == [str(checkout)]


def test_a_failed_installation_is_tried_again(checkout):
    python = checkout.parent / "python3"
    working = python.read_text()
    write_executable(python, working + 'case "$*" in *"pip install"*) exit 1 ;; esac\n')
    done, _ = launch(checkout, "train")
    assert done.returncode == 2 and "installation failed" in done.stderr
    write_executable(checkout / ".venv" / "bin" / "python", working)
    done, calls = launch(checkout, "train")
    assert done.returncode == 0, done.stderr
    assert installed(calls) == [str(checkout)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage"),
        (["trian"], "unknown command 'trian'"),
        (["train evaluate"], "unknown command"),
        (["sample"], "no command"),
    ],
)
def test_what_it_cannot_run_is_one_line_and_status_2(checkout, arguments, said):
    (checkout / "sngpt_jax" / "sample.py").unlink()
    done, calls = launch(checkout, *arguments)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1 and not calls


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_help_names_every_command_and_installs_nothing(checkout, word):
    done, calls = launch(checkout, word)
    assert done.returncode == 0 and not done.stderr and not calls
    source = (ROOT / "launch.sh").read_text()
    cases = re.findall(r"^([\w| ]+)\) module=", source, flags=re.MULTILINE)
    known = set(" | ".join(cases).split(" | "))
    shown = re.search(r"launch\.sh ([\w|]+) ", done.stdout)[1].split("|")
    assert len(known) > 10 and set(shown) == known


def test_a_python_that_is_too_old_is_named(checkout):
    write_executable(checkout.parent / "python3", "#!/bin/sh\nexit 1\n")
    done, _ = launch(checkout, "train")
    assert done.returncode == 2 and "needs Python 3.11 or newer" in done.stderr


def test_tasks_of_a_slurm_step_share_one_installation_and_run_each(checkout):
    """On a fresh checkout one task installs, slowly, while the other waits."""
    python, log = checkout.parent / "python3", checkout.parent / "log"
    slow = python.read_text().replace('*"-m venv"*)', '*"pip install"*) sleep 1 ;;\n*"-m venv"*)')
    write_executable(python, slow + f'echo "task $SLURM_PROCID of $SLURM_NTASKS: $*" >> "{log}"\n')
    env = environment(checkout) | {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]"}
    env |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    command = [checkout / "launch.sh", "train", "--config", "x"]
    tasks = []
    for task in "01":
        task_env = env | {"SLURM_PROCID": task}
        tasks.append(subprocess.Popen(command, env=task_env, stderr=subprocess.PIPE, text=True))
    errors = [task.communicate(timeout=60)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    calls = log.read_text().splitlines()
    assert installed([call for call in calls if not call.startswith("task")]) == [str(checkout)]
    for task in range(2):
        assert f"task {task} of 2: -m sngpt_jax.train --config x" in calls


def test_addresses_go_to_the_command(checkout):
    arguments = ["--coordinator", "node1:12345", "--process-id", "1", "--num-processes", "2"]
    _, calls = launch(checkout, "train", *arguments)
    assert calls[-1].endswith("-m sngpt_jax.train " + " ".join(arguments))
