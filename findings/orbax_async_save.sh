#!/usr/bin/env bash
# orbax: save_async() of a Checkpointer skips a step while the previous save is in progress.
#
# One would guess: `save_async(step, state)` saves every step that it is called with. An earlier
# save makes it wait. A Checkpointer without policies has no reason to skip a step.
# What happens: the default policy skips a step if an earlier save is still in progress. Of five
# calls in a row, only the first is saved. The other calls return None, without an exception or a
# warning. `save` in the same loop saves all five. So does `save_async` with
# FixedIntervalPolicy(1).
# Why it matters: the final save of a training often follows a periodic save closely. The final
# weights are then not on the disk, although the program ends with status 0.
# Seen with: orbax-checkpoint 0.12.8, jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11.
#
# Output:
#   orbax-checkpoint 0.12.8 jax 0.10.2
#   save_async: on the disk [1], None returned for [2, 3, 4, 5]
#   save: on the disk [1, 2, 3, 4, 5], None returned for []
#   save_async with FixedIntervalPolicy(1): on the disk [1, 2, 3, 4, 5], None returned for []

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
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

print("orbax-checkpoint", version("orbax-checkpoint"), "jax", jax.__version__)
weight = np.random.default_rng(0).standard_normal(4_000_000, np.float32)
state = {"weight": jax.numpy.asarray(weight)}
every_step = ocp.training.save_decision_policies.FixedIntervalPolicy(1)


def steps_saved(name, method, **options):
    """The steps on the disk after `method` saved steps 1 to 5 and the Checkpointer closed."""
    folder = Path(name).absolute()
    with ocp.training.Checkpointer(folder, **options) as checkpointer:
        returned = [getattr(checkpointer, method)(step, state) for step in range(1, 6)]
    skipped = [step for step, value in enumerate(returned, 1) if value is None]
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    print(f"{name}: on the disk {steps}, None returned for {skipped}")
    return steps


asynchronous = steps_saved("save_async", "save_async")
synchronous = steps_saved("save", "save")
with_policy = steps_saved(
    "save_async with FixedIntervalPolicy(1)", "save_async", save_decision_policy=every_step
)
if 5 in asynchronous:
    sys.exit("the behaviour changed: save_async() without policies saved the last step")
if synchronous != [1, 2, 3, 4, 5] or with_policy != [1, 2, 3, 4, 5]:
    sys.exit("the behaviour changed: save(), or save_async() with a policy, left out a step")
PY
