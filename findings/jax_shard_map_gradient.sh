#!/usr/bin/env bash
# jax.shard_map: the mean of the local gradients is too large by the number of devices.
#
# One would guess: inside shard_map, `jax.grad` differentiates the loss of the local rows. `pmean`
# then averages the local gradients over the devices. The same lines are right in `jax.pmap`.
# What happens: by default (check_vma=True) `jax.grad` itself sums the gradient of a replicated
# parameter over the devices. `pmean` averages equal sums and changes nothing. On 4 devices the
# result is 4 times too large. Jax raises no error and no warning. With check_vma=False it is
# right.
# Why it matters: the code looks correct, and the training still learns. Adam hides the factor.
# With SGD or gradient clipping the effective settings change with the number of devices.
# Seen with: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11, 4 CPU devices.
#
# Output:
#   jax 0.10.2 with 4 CPU devices
#   gradient of the mean over all rows, without shard_map: 3.5
#   pmean of the gradient in pmap:                         3.5
#   pmean of the gradient in shard_map, default:           14.0
#   pmean of the gradient in shard_map, check_vma=False:   3.5

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$work"
unset PYTHONPATH XLA_FLAGS
export JAX_PLATFORMS=cpu

"$work/venv/bin/python" - <<'PY'
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

print("jax", jax.__version__, "with", jax.device_count(), "CPU devices")
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
weight = jnp.float32(3)
rows = jnp.arange(8, dtype=jnp.float32)


def loss(weight, rows):
    return jnp.mean(weight * rows)


def mean_gradient(weight, rows):
    return jax.lax.pmean(jax.grad(loss)(weight, rows), "data")


def sharded(**options):
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    return float(jax.jit(jax.shard_map(mean_gradient, mesh=mesh, **specs, **options))(weight, rows))


whole = float(jax.grad(loss)(weight, rows))
default = sharded()
unchecked = sharded(check_vma=False)
pmapped = jax.pmap(mean_gradient, axis_name="data", in_axes=(None, 0))
in_pmap = float(pmapped(weight, rows.reshape(4, 2))[0])
print("gradient of the mean over all rows, without shard_map:", whole)
print("pmean of the gradient in pmap:                        ", in_pmap)
print("pmean of the gradient in shard_map, default:          ", default)
print("pmean of the gradient in shard_map, check_vma=False:  ", unchecked)
if not np.isclose(default, 4 * whole):
    sys.exit(f"the behaviour changed: the default gives {default}, not 4 times {whole}")
if not np.allclose([unchecked, in_pmap], whole):
    sys.exit(f"the behaviour changed: check_vma=False gives {unchecked}, pmap {in_pmap}")
PY
