"""How the tests of the documentation follow a page: its fenced blocks, in order, in a folder.

Blocks without a language are commands, `python` blocks begin with the path of the file to save,
`diff` blocks are patches; `text` blocks are what is printed, or needs another machine. `launch.sh`
and `.venv/bin/python` are stand-ins that run this environment and this or the folder's copy of the
tree.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests import tiny_run

ROOT = Path(__file__).parents[2]
LAUNCH = """#!/bin/sh
command=$1; shift
export PYTHONPATH='{tree}:{tree}/kernels'
case "$command" in
test) exec '{python}' -m pytest -q -p no:cacheprovider "$@" ;;
train) module=train; set -- "$@" {training} ;;
export) module=export ;;
*) module=$command ;;
esac
exec '{python}' -m "sngpt_jax.$module" "$@"
"""
COMMANDS = {"": ["bash", "-eu"], "diff": ["git", "apply", "--recount", "-C1"]}


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def follow(page: Path, folder: Path, tree: Path, training: str = "") -> list[str]:
    """Follows `page` in `folder` with the commands of `tree`; what each block of commands printed.

    `training` are arguments for every `./launch.sh train`.
    """
    write_executable(
        folder / "launch.sh", LAUNCH.format(tree=tree, python=sys.executable, training=training)
    )
    write_executable(folder / ".venv/bin/python", f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    env = {name: value for name, value in tiny_run.environment().items() if name != "PYTHONPATH"}
    env |= {
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
    }
    # the folder is no part of a repository around it
    env |= {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    printed = []
    for language, text in blocks(page):
        if language == "python":
            file = folder / re.match(r"# (\S+\.py)\n", text)[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        elif command := COMMANDS.get(language):
            done = subprocess.run(
                command,
                input=text,
                cwd=folder,
                env=env,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed += [done.stdout] if language == "" else []
    return printed


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
