"""`--quiet` of every command, and a run on terminals of several widths."""

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios

import pytest

from tests import tiny_run
from tests.screen import plain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


TOKENS = ("--tokens", "2048")
COMMANDS = {
    "train": (["--config", "{recipe}", "--run-dir", "{run}"], "finished\n  run "),
    "evaluate": (["--run", "{run}", *TOKENS], "evaluated\n  model "),
    "audit": (["--run", "{run}"], "audited\n  run "),
    "export": (["--run", "{run}", "--out", "{out}/m.sngpt", *TOKENS], "exported\n  artifact "),
    "sample": (["--run", "{run}", "--prompt", "ab", "--max-tokens", "4"], "ab"),
    "plan": (["--config", "{recipe}"], "parameters"),
    "prepare": (["--verify", "{recipe.parent}/data"], "verified\n  data "),
    "report": (["{run}", "--out", "{out}/page.html"], "1 run: "),
    "interop": (["export", "--run", "{run}", "--out", "{out}/m.safetensors"], "exported\n  file "),
    "bench": (["--config", "{recipe}", "--rounds", "1", "--steps", "1"], "1 x cpu"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_commands_print_their_result_alone(tiny_recipe, tiny_trained, outputs, name):
    options, begins = COMMANDS[name]
    names = {"recipe": tiny_recipe, "run": tiny_trained, "out": outputs}
    done = tiny_run.run(name, *(option.format(**names) for option in options), "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(begins)


def on_a_terminal(columns: int, name: str, *arguments: object, **environment: str) -> str:
    """What a command, which succeeds, writes to a terminal of so many columns."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    env = {k: v for k, v in tiny_run.environment().items() if k not in ("COLUMNS", "NO_COLOR")}
    env |= {"TERM": "xterm-256color"} | environment
    streams = {"stdin": end, "stdout": end, "stderr": end}
    command, written = tiny_run.command(name, *arguments), b""
    with subprocess.Popen(command, cwd=tiny_run.ROOT, env=env, **streams) as process:
        os.close(end)
        with contextlib.suppress(OSError):  # as Linux says that the other side is closed
            while part := os.read(terminal, 65536):
                written += part
        os.close(terminal)
    text = written.decode()
    assert process.returncode == 0, text
    return text


def test_a_run_on_a_narrow_terminal(tiny_recipe, tmp_path):
    run = tmp_path / "run"
    text = on_a_terminal(40, "train", "--config", tiny_recipe, "--run-dir", run)
    # colours; the cursor is given back
    assert "\x1b[32m" in text and text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    lines = plain(text).replace("\r\n", "\n").splitlines()
    shown = [line.split("\r")[-1] for line in lines]
    steps = [line for line in shown if line.startswith(("step 000", "val  000")) and "│" in line]
    assert len(steps) > 5 and max(map(len, steps)) <= 69
    (box,) = [i for i, line in enumerate(shown) if line.startswith("╭─ finished ─")]
    assert all(len(line) == 40 for line in lines[box + 1 :] if line.startswith("│"))
    assert f"-m sngpt_jax.export --run {run} --out {run}/model.sngpt" in " ".join(lines)


def test_the_same_in_plain_characters(tiny_trained, tiny_recipe):
    arguments = ("--config", tiny_recipe, "--run-dir", tiny_trained)
    plainly = {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    text = on_a_terminal(80, "train", *arguments, **plainly)
    assert text.isascii() and "+- finished -" in text and "\x1b[3" not in text
