#!/usr/bin/env bash
# jax: an array divided by a number is not rounded as IEEE 754 demands, and 41 / 41 is not 1.
#
# One would guess: float32 division is rounded correctly in jax, as it is in numpy. 41 / 41 is 1.
# What happens: XLA computes the reciprocal of the number once, and multiplies the array by it. The
# result is rounded twice. `jnp.full(4, 41.0) / 41` is 0.99999994, and its floor is 0. This happens
# without any fast-math option. Division by an array of the same shape is exact.
# Why it matters: a quantizer in jax and the same quantizer in numpy round ties to different codes.
# A bucket index `floor(x / width)` is one too low for some values on a bucket's edge.
# Seen with: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11, CPU.
#
# Output:
#   jax 0.10.2 numpy 2.4.6 cpu
#   jnp.full(4, 41.0) / 41 = [0.99999994 0.99999994 0.99999994 0.99999994] and its floor is [0. 0.
#       0. 0.]
#   n / n is not 1, for n from 1 to 1000:
#     numpy: 0
#     jax, array by a number: 135 such as [41, 47, 55, 61, 82]
#     jax, array by an array: 0
#   operations in XLA's program: multiply of f32[4], divide of f32[]

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
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__, jax.default_backend())


@jax.jit
def by_number(x, divisor):
    return x / divisor


numbers = [np.float32(n) for n in range(1, 1001)]
wrong_numpy = [int(n) for n in numbers if (np.full(4, n) / n != 1).any()]
wrong_jax = [int(n) for n in numbers if (by_number(np.full(4, n), n) != 1).any()]
wrong_arrays = [int(n) for n in numbers if (by_number(np.full(4, n), np.full(4, n)) != 1).any()]
quotient = jnp.full(4, 41.0) / 41
print("jnp.full(4, 41.0) / 41 =", quotient, "and its floor is", jnp.floor(quotient))
print("n / n is not 1, for n from 1 to 1000:")
print("  numpy:", len(wrong_numpy))
print("  jax, array by a number:", len(wrong_jax), "such as", wrong_jax[:5])
print("  jax, array by an array:", len(wrong_arrays))
program = by_number.lower(np.full(4, numbers[0]), numbers[0]).compile().as_text()
operations = re.findall(r"= (f32\[4?\])\S* (divide|multiply)\(", program)
print("operations in XLA's program:", ", ".join(f"{name} of {kind}" for kind, name in operations))
if not wrong_jax or float(quotient[0]) == 1:
    sys.exit("the behaviour changed: jax divides an array by a number exactly")
if wrong_numpy or wrong_arrays:
    sys.exit("the behaviour changed: numpy, or jax with two arrays, is no longer exact")
PY
