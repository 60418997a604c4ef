#!/usr/bin/env bash
# jax: cost_analysis() counts the body of a loop once, whatever the number of iterations.
#
# One would guess: `compiled.cost_analysis()["flops"]` is the number of operations in one call. A
# scan of 1,000 iterations has 1,000 times the operations of one iteration. The compiler knows the
# number of iterations, because it is a constant.
# What happens: scans of 2, 10 and 1,000 iterations all report the operations of one iteration. The
# same 10 iterations, unrolled, report 10 times as many.
# Why it matters: models scan over layers and microbatches. A utilization computed from this number
# is too low by the number of iterations, and can still look plausible.
# Seen with: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11, CPU.
#
# Output:
#   jax 0.10.2 cpu
#   one product takes 524,288 operations
#   scan of    2 products:   524,290 reported,   1,048,576 done
#   scan of   10 products:   524,290 reported,   5,242,880 done
#   scan of 1000 products:   524,290 reported, 524,288,000 done
#     10 products, unrolled: 5,242,880 reported

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
import sys

import jax
import jax.numpy as jnp

print("jax", jax.__version__, jax.default_backend())


def flops(length, unroll=1):
    """The operations that jax reports for `length` products of 64 x 64 matrices."""

    def layer(x, _):
        return x @ x, None

    def network(x):
        return jax.lax.scan(layer, x, None, length=length, unroll=unroll)[0]

    return int(jax.jit(network).lower(jnp.ones((64, 64))).compile().cost_analysis()["flops"])


product = 2 * 64**3
looped = {length: flops(length) for length in (2, 10, 1000)}
unrolled = flops(10, unroll=10)
print(f"one product takes {product:,} operations")
for length, reported in looped.items():
    print(f"scan of {length:>4} products: {reported:>9,} reported, {length * product:>11,} done")
print(f"  10 products, unrolled: {unrolled:,} reported")
if max(looped.values()) > 1.1 * product:
    sys.exit("the behaviour changed: cost_analysis() counts more than one iteration of a loop")
if unrolled < 10 * product:
    sys.exit("the behaviour changed: cost_analysis() no longer counts all of an unrolled loop")
PY
