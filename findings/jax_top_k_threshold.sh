#!/usr/bin/env bash
# jax.lax.top_k: reading only the k-th largest value makes XLA sort the whole row.
#
# One would guess: `lax.top_k(x, 64)[0][:, -1]` costs as much as `lax.top_k(x, 64)`, or a bit less.
# What happens: on a CPU, XLA has a fast routine for top-k, TopK. The compiled program does not call
# it, and sorts all 8,192 columns instead. `lax.top_k(x, 64)[0].min(-1)` returns the same values,
# and its program does call TopK.
# Why it matters: this is the usual way to write a threshold, for sparse activations or for
# sampling among the k most likely tokens. The smaller result took about 30 times as long.
# The script checks the compiled programs. It prints the times as an illustration.
# Seen with: jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6, Python 3.11, CPU.
#
# Output:
#   jax 0.10.2 cpu
#   lax.top_k(x, 64)             compiles to TopK,   35.1 ms
#   lax.top_k(x, 64)[0].min(-1)  compiles to TopK,   34.2 ms
#   lax.top_k(x, 64)[0][:, -1]   compiles to sort,  862.4 ms
#   the minimum and the last value are equal: True

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
import time

import jax
import numpy as np

print("jax", jax.__version__, jax.default_backend())
x = jax.device_put(np.random.default_rng(0).standard_normal((256, 8192), np.float32))
forms = {
    "lax.top_k(x, 64)": lambda x: jax.lax.top_k(x, 64),
    "lax.top_k(x, 64)[0].min(-1)": lambda x: jax.lax.top_k(x, 64)[0].min(-1),
    "lax.top_k(x, 64)[0][:, -1]": lambda x: jax.lax.top_k(x, 64)[0][:, -1],
}
found, results = [], []
for name, form in forms.items():
    compiled = jax.jit(form).lower(x).compile()
    text = compiled.as_text()
    found.append(
        "TopK" if 'custom_call_target="TopK"' in text else "sort" if " sort(" in text else "?"
    )
    results.append(jax.block_until_ready(compiled(x)))
    start = time.perf_counter()
    jax.block_until_ready(compiled(x))
    print(f"{name:28} compiles to {found[-1]:4}, {1e3 * (time.perf_counter() - start):6.1f} ms")
print("the minimum and the last value are equal:", bool((results[1] == results[2]).all()))
if found != ["TopK", "TopK", "sort"]:
    sys.exit(f"the behaviour changed: XLA compiles the three forms to {found}")
PY
