"""docs/tutorial.md as a reader follows it: its commands in order, in an empty folder, and what its text says of the results.

Blocks without a language are commands, `python` blocks begin with the name of the file to save, and `text` blocks are what is
printed or needs another machine. `launch.sh` is a stand-in that runs the same module in this environment and shortens the
training to 20 steps; all else is run as it stands.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CAP = 16_000_000
LAUNCH = """#!/bin/sh
command=$1; shift
case "$command" in
prepare) module=data.prepare ;;
train) module=train; set -- "$@" --train.steps 20 ;;
*) module=$command ;;
esac
PYTHONPATH='{root}' exec '{python}' -m "sngpt_jax.$module" "$@"
"""


def blocks(page):
    """(language, text) of every fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def write_executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder in which the page's blocks were followed, and what each command block printed on stdout."""
    folder = tmp_path_factory.mktemp("tutorial")
    write_executable(folder / "launch.sh", LAUNCH.format(root=ROOT, python=sys.executable))
    write_executable(folder / ".venv/bin/python", f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
    env = {name: value for name, value in tiny_run.environment().items() if name != "PYTHONPATH"}
    env |= {"HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"}
    printed = []
    for language, text in blocks(ROOT / "docs/tutorial.md"):
        if language == "python":
            name = re.match(r"# (\S+\.py)\n", text)[1]
            (folder / name).write_text(text)
        elif language == "":
            done = subprocess.run(["bash", "-eu"], input=text, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    return folder, printed


def test_the_artifact_is_below_the_cap_and_scores(followed):
    folder, _ = followed
    exported, scored = (json.loads((folder / f"{name}.json").read_text()) for name in ("export", "artifact"))
    size = (folder / "pocket.sngpt").stat().st_size
    assert exported["artifact_bytes"] == size
    assert exported["total_bytes"] == size + (folder / "pocket.pyz").stat().st_size <= exported["limit"] == CAP
    assert exported["fits"] is True
    assert math.isfinite(scored["bpb"]) and scored["bpb"] > 0
    assert scored["bpb"] == pytest.approx(exported["score"]["bpb_after"], rel=1e-5)  # both over all of the held-out text


def test_what_the_page_says_of_the_model_and_the_run(followed):
    folder, printed = followed
    page = (ROOT / "docs/tutorial.md").read_text()
    planned, summary = "".join(printed), json.loads((folder / "runs/pocket/summary.json").read_text())
    for parameters in re.findall(r"([\d,]{7,}) parameters", page):
        assert f"parameters   {parameters} " in planned
    assert summary["val_bpb"] < summary["untrained_val_bpb"]
    manifest = json.loads((folder / "data/pocket/manifest.json").read_text())
    assert sum(shard["documents"] for shard in manifest["val"]) == 8
    assert len(list((folder / "texts").iterdir())) == sum(shard["documents"] for s in ("train", "val") for shard in manifest[s])


def test_sliding_windows_score_at_least_as_well_as_standard_ones(followed):
    _, printed = followed
    (both,) = (text for text in printed if "stride 64" in text)
    standard, sliding = (float(bpb) for bpb in re.findall(r"([\d.]+) bits/byte", both))
    assert sliding < standard
