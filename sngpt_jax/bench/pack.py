"""What a machine without a network needs for first light: `bench first-light --pack FOLDER`.

The machine is expected to have `EXPECTED`. The folder holds the other packages that training and
the benchmarks import, unpacked, and a prepared folder for the short training run.
"""

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench.harness import Say
from sngpt_jax.config.recipe import load
from sngpt_jax.data.prepared import prepared_data

EXPECTED = ("jax", "flax", "optax", "orbax-checkpoint", "sentencepiece", "torch", "safetensors")
UNUSED = ("pyarrow", "tokenizers")  # by training and the benchmarks
MOST_BYTES = 60 * 2**20
DATA_TOKENS = 500_000


def closure(names: Iterable[str]) -> dict[str, str]:
    """The packages with all that they need, as installed here: names → requirements."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop().lower())
        if name in found:
            continue
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that this machine lacks
        found[name] = f"{name}=={installed.version}"
        for line in installed.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def missing() -> list[str]:
    """The requirements that the machine is not expected to have."""
    needed = [Requirement(line) for line in metadata.requires("sngpt-jax") or ()]
    own = [r.name for r in needed if not (r.marker and "extra" in str(r.marker))]
    there = closure(EXPECTED).keys() | set(UNUSED)
    return [text for name, text in closure(set(own) - set(UNUSED)).items() if name not in there]


def make(folder: Path, python: str, say: Say) -> dict[str, Any]:
    """Makes the folder for that version of Python on Linux. Raises `UserError` if it cannot."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--pack {folder}: it is not empty; name another folder")
    wheels, site = folder / "wheels", folder / "site"
    wheels.mkdir(parents=True)
    platforms = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", python]
    options += [word for platform in platforms for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    if subprocess.run([*pip, "--dest", str(wheels), *missing()], check=False).returncode:
        raise UserError(f"--pack {folder}: pip could not download the packages; see its message")
    packed = sorted(wheels.iterdir())
    for wheel in packed:
        zipfile.ZipFile(wheel).extractall(site)
        wheel.unlink()
    wheels.rmdir()
    config = load("quickstart")
    data = replace(config.data, dir=str(folder / "data"), max_tokens=DATA_TOKENS)
    prepared_data(replace(config, data=data))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        raise UserError(f"--pack {folder}: it has {size >> 20} MiB, more than 60")
    command = f"python3 -m sngpt_jax.bench first-light --data {folder}/data"
    say(f"{len(packed)} packages and the data take {size / 2**20:.1f} MiB in {folder}")
    say(f"there, in the checkout: PYTHONPATH={site}:.:kernels {command}")
    return {"packages": [wheel.name for wheel in packed], "bytes": size}
