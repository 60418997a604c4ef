#!/usr/bin/env bash
# orbax: a checkpoint with a flipped bit loads without an error or a warning.
#
# One would guess: a checkpoint format for long trainings stores checksums of its data. Loading a
# damaged file raises an error.
# What happens: the script saves five checkpoints and flips one bit in the data file of each. All
# five load. Every loaded array differs from the saved one, in one number or in thousands.
# Why it matters: a bit that flips on a disk or in a copy silently changes the weights, and the
# next save keeps the damage. A program that wants to detect it must keep its own checksums.
# The exact positions and numbers differ from run to run, because the files are not identical.
# Seen with: orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2, numpy 2.4.6, Python 3.11.
#
# Output:
#   orbax-checkpoint 0.12.8 tensorstore 0.1.86 jax 0.10.2
#   byte at 1/10 of 370,104: loaded, 1 numbers differ, such as 0.56562334 for 0.56251055
#   byte at 3/10 of 370,101: loaded, 2 numbers differ, such as -3.8368621e-11 for -0.50195658
#   byte at 5/10 of 370,105: loaded, 4462 numbers differ, such as -3.470604e-36 for -0.8188405
#   byte at 7/10 of 370,104: loaded, 1 numbers differ, such as -0.5293417 for -0.52932644
#   byte at 9/10 of 370,102: loaded, 1 numbers differ, such as -0.33976871 for -0.3397916

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"
unset PYTHONPATH XLA_FLAGS
export JAX_PLATFORMS=cpu

"$work/venv/bin/python" - <<'PY'
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

print(*(f"{name} {version(name)}" for name in ("orbax-checkpoint", "tensorstore", "jax")))
# This warning appears for undamaged checkpoints too: the call names no shardings.
warnings.filterwarnings("ignore", "Sharding info not provided")
saved = np.random.default_rng(0).standard_normal(100_000, np.float32)
silent = 0
for tenth in (1, 3, 5, 7, 9):
    folder = Path(f"checkpoint_{tenth}").absolute()
    ocp.save(folder, {"weight": jnp.asarray(saved)})
    file = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) * tenth // 10] ^= 0x40
    file.write_bytes(content)
    try:
        loaded = np.asarray(ocp.load(folder)["weight"])
    except Exception as error:
        print(f"byte at {tenth}/10 of {len(content):,}: refused, {type(error).__name__}")
        continue
    differ = np.flatnonzero(loaded != saved)
    silent += bool(len(differ))
    example = f", such as {loaded[differ[0]]:.8g} for {saved[differ[0]]:.8g}" if len(differ) else ""
    print(f"byte at {tenth}/10 of {len(content):,}: loaded, {len(differ)} numbers differ{example}")
if silent < 3:
    sys.exit(f"the behaviour changed: {silent} of 5 damaged checkpoints loaded with other numbers")
PY
