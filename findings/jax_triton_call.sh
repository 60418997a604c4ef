#!/usr/bin/env bash
# jax-triton: pip installs it beside a jax with which every call under jit fails.
#
# One would guess: jax 0.12 warns that the Triton backend of Pallas will be removed, and advises to
# switch to jax_triton. pip resolves jax 0.12.0.1 with the newest jax-triton without a conflict. So
# the two work together.
# What happens: the import works, and so does tracing. Lowering any function under jit with a
# `triton_call` raises a TypeError about the number of arguments of an internal function. The
# requirements of jax-triton 0.4.1 say jax>=0.11.0, without an upper limit. With jax 0.11.2 the call
# is lowered, there with jax's CUDA plugin.
# Why it matters: an update of jax breaks every kernel of a project that followed jax's advice, at
# the first call and not at the installation. jax needs an upper limit below 0.12 beside it.
# Seen with: jax-triton 0.4.1, triton 3.9.0, jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5,
# Python 3.12.
# No GPU and no CUDA plugin is needed, because the error comes before the kernel is compiled.
#
# Output:
#   jax-triton 0.4.1 jax 0.12.0.1
#   requires jax>=0.11.0
#   traced
#   lowering: TypeError: _triton_kernel_call_dce_rule() takes 2 positional arguments but 3 were
#       given

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.12 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax-triton==0.4.1 triton==3.9.0 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
cd "$work"
unset PYTHONPATH XLA_FLAGS
export JAX_PLATFORMS=cpu

cat >kernel.py <<'PY' # triton reads the source of a kernel from its file
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, y_ptr, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at))


def double(x):
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax_triton.triton_call(
        x, kernel=double_kernel, out_type=result, grid=1, size=64, compute_capability=90
    )


print(f"jax-triton {jax_triton.__version__} jax {jax.__version__}")
requirements = importlib.metadata.requires("jax-triton")
print("requires", ", ".join(r for r in requirements if r.startswith("jax")))
traced = jax.jit(double).trace(jnp.ones(64))
print("traced")
try:
    traced.lower(lowering_platforms=("cuda",))
except TypeError as error:
    print(f"lowering: TypeError: {error}")
else:
    sys.exit("the behaviour changed: the call lowers")
PY
"$work/venv/bin/python" kernel.py
