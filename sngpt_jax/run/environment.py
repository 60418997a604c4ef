"""Versions, devices and commit of a run: one line of `environment.jsonl` per start."""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sngpt_jax
from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.cluster import processes

MAX_BYTES = 2**20  # of an environment.jsonl
MOST_STARTS = 1000  # kept: the first one and the latest ones
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")


def path(run_dir: Path) -> Path:
    """The file of a run's starts."""
    return run_dir / "environment.jsonl"


def git_commit(folder: Path) -> str | None:
    """The commit of the program in `folder`, with `+changes` if its files have changed since; None
    if git does not track the folder.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels")
    return f"{commit}+changes" if commit and changes else commit


def environment(step: int) -> dict[str, Any]:
    """The environment of this process, which resumes after `step`. It omits the machine's name."""
    import jax  # only here, because reading a run needs none

    device = jax.devices()[0]
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sngpt_jax": sngpt_jax.__version__,
        "commit": git_commit(Path(sngpt_jax.__file__).parent),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": processes.count(),
        "backend": " ".join(device.client.platform_version.split()),
    }


def record(run_dir: Path, step: int, kernels: Mapping[str, str] | None = None) -> None:
    """Appends this start of the run to its `environment.jsonl`, with the verdicts on its custom
    kernels. Only process 0 writes.
    """
    if processes.index():
        return
    before = _lines(run_dir)
    start = environment(step) | ({"kernels": dict(kernels)} if kernels else {})
    lines = [*before[:1], *before[1:][2 - MOST_STARTS :], json.dumps(start).encode()]
    write_bytes_atomic(path(run_dir), b"\n".join(lines) + b"\n")


def _lines(run_dir: Path) -> list[bytes]:
    if not path(run_dir).exists():
        return []
    return untrusted.read_bytes(path(run_dir), MAX_BYTES, UserError).splitlines()


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Every start of a run, in order. Lines that are no JSON objects are skipped."""
    found = []
    for line in _lines(run_dir):
        with contextlib.suppress(ValueError):
            found.append(typed_json.loads(line))
    return [start for start in found if isinstance(start, dict)]


def last(run_dir: Path) -> dict[str, Any]:
    """The latest start of a run, or {}."""
    return (read(run_dir) or [{}])[-1]
