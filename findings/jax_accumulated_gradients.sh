#!/usr/bin/env bash
# jax.jit: gradient accumulation over sharded microbatches communicates in every microbatch.
#
# One would guess: the sum over microbatches is linear. The compiler therefore adds up the local
# gradients in the loop, and exchanges the sum between the devices once, after the loop.
# What happens: the compiled loop contains an all-reduce of the whole gradient, once per
# microbatch. The same function in shard_map(check_vma=False), with a `pmean` after the scan, has a
# single all-reduce outside the loop. Both gradients are equal.
# Why it matters: many people accumulate gradients to communicate less often. Here a step with 8
# microbatches sends 8 times the bytes, and only the compiled program shows it.
# Seen with: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11, 4 CPU devices.
#
# Output:
#   jax 0.10.2 with 4 CPU devices
#   the gradients agree: True
#   jit alone: 1 all-reduce in the program, 1 in the loop over 8 microbatches
#   shard_map: 1 all-reduce in the program, 0 in the loop over 8 microbatches

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
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

print("jax", jax.__version__, "with", jax.device_count(), "CPU devices")
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
weight = jax.device_put(rng.standard_normal((32, 32), np.float32), NamedSharding(mesh, P()))
rows = rng.standard_normal((8, 16, 32), np.float32)
microbatches = jax.device_put(rows, NamedSharding(mesh, P(None, "data")))


def loss(weight, rows):
    return jnp.mean((rows @ weight) ** 2)


def accumulate(weight, microbatches):
    def add(total, rows):
        return total + jax.grad(loss)(weight, rows), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(weight), microbatches)
    return total / len(microbatches)


def local(weight, microbatches):
    return jax.lax.pmean(accumulate(weight, microbatches), "data")


def all_reduces(function):
    """The all-reduces in the loop's body, and in the whole compiled program."""
    text = function.lower(weight, microbatches).compile().as_text()
    bodies = re.findall(r"while\(.*body=%?([\w.-]+)", text)
    parts = {part.split(" ", 1)[0].lstrip("%"): part for part in re.split(r"\n(?=%|ENTRY )", text)}
    operation = re.compile(r"all-reduce(?:-start)?\(")
    return sum(len(operation.findall(parts[body])) for body in bodies), len(operation.findall(text))


automatic = jax.jit(accumulate)
by_hand = jax.jit(
    jax.shard_map(local, mesh=mesh, in_specs=(P(), P(None, "data")), out_specs=P(), check_vma=False)
)
gradients = automatic(weight, microbatches), by_hand(weight, microbatches)
print("the gradients agree:", np.allclose(*gradients, atol=1e-6))
counts = {"jit alone": all_reduces(automatic), "shard_map": all_reduces(by_hand)}
for name, (in_loop, in_all) in counts.items():
    print(f"{name}: {in_all} all-reduce in the program, {in_loop} in the loop over 8 microbatches")
if counts != {"jit alone": (1, 1), "shard_map": (0, 1)}:
    sys.exit("the behaviour changed: the compiled programs have their all-reduces elsewhere")
PY
