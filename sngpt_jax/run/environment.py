"""What a run was started with: versions, devices and commit, a line of `environment.jsonl` at
every start of the run.
"""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from sngpt_jax import __version__
from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.cluster import processes

MAX_BYTES = 2**20  # of an environment.jsonl
MOST_STARTS = 1000  # that are kept: the first, and the latest ones
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def path(run_dir: Path) -> Path:
    """The file that the starts of a run are kept in."""
    return run_dir / "environment.jsonl"


def git_commit(folder: Path) -> str | None:
    """The commit that the program in `folder` is of, with `+changes` where files of it were
    changed since.

    None where git does not keep that folder: an installed wheel inside of somebody's repository is
    not of its commits.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels")
    return f"{commit}+changes" if commit and changes else commit


def environment(step: int) -> dict[str, Any]:
    """The environment of this process, which goes on after optimizer step `step`; of the machine's
    name nothing.
    """
    device = jax.devices()[0]
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sngpt_jax": __version__,
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": processes.count(),
        "backend": " ".join(device.client.platform_version.split()),
    }


def record(run_dir: Path, step: int) -> None:
    """Appends this start of the run to its `environment.jsonl`. Process 0 alone writes. Raises
    `UserError` where it cannot.
    """
    if processes.index():
        return
    before = (
        untrusted.read_bytes(path(run_dir), MAX_BYTES, UserError).splitlines()
        if path(run_dir).exists()
        else []
    )
    lines = [*before[:1], *before[1:][2 - MOST_STARTS :], json.dumps(environment(step)).encode()]
    try:
        write_bytes_atomic(path(run_dir), b"\n".join(lines) + b"\n")
    except OSError as error:
        raise UserError(
            f"{path(run_dir)}: cannot be written: {error.strerror}; choose another --run-dir"
        ) from None


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Every start of a run, the first one first; none of runs that have no such file, and without
    lines that hold none.
    """
    if not path(run_dir).exists():
        return []
    found = []
    for line in untrusted.read_bytes(path(run_dir), MAX_BYTES, UserError).splitlines():
        try:
            value = typed_json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
