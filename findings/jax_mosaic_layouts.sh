#!/usr/bin/env bash
# jax.experimental.pallas.mosaic_gpu: a kernel that runs in the interpreter does not compile.
#
# One would guess: jax infers how the threads hold a tile. A kernel without layouts that is right in
# GPU interpret mode, without a race, also compiles.
# What happens: a kernel divides the rows of a tile by their sums. The interpreter runs it, and its
# detector of races finds nothing. Lowering the kernel for a GPU raises a ValueError that blames
# layout casts of the user, but the kernel has none. Adding a layout cast mends it. Describing
# tiles and a swizzle of the buffers in shared memory mends it too.
# Why it matters: a test on a CPU passes for a kernel that does not compile for any GPU. Sums of
# rows are in every softmax and every norm. The message points away from the remedy.
# No GPU and no CUDA plugin is needed, because jax infers layouts while it lowers.
# Seen with: jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5, Python 3.12, CPU.
#
# Output:
#   jax 0.12.0.1 cpu
#   interpreted with the detector of races: largest error 0e+00
#     no layout cast: ValueError: Failed to infer a possible set of layouts. This should only happen
#       if user-provided layout cast
#     a layout cast of the loaded tile: lowers
#     no layout cast, but tiles and a swizzle: lowers

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.12 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5
cd "$work"
unset PYTHONPATH XLA_FLAGS
export JAX_PLATFORMS=cpu

"$work/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = (64, 64)


def kernel(transforms=(), layout=None, interpret=None):
    def body(x_gmem, out_gmem, x_smem, out_smem, arrived):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, arrived)
        plgpu.barrier_wait(arrived)
        x = plgpu.load(x_smem, layout=layout)
        out_smem[...] = x / jnp.sum(x, axis=1)[:, None]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    buffer = plgpu.SMEM(TILE, jnp.float32, transforms=transforms)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(TILE, jnp.float32),
        scratch_types=[buffer, buffer, plgpu.Barrier()],
        interpret=interpret,
    )


x = jax.random.uniform(jax.random.key(0), TILE)
races = plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
error = jnp.abs(kernel(interpret=races)(x) - x / x.sum(axis=1, keepdims=True)).max()
print(f"jax {jax.__version__} {jax.default_backend()}")
print(f"interpreted with the detector of races: largest error {error:.0e}")


def lowered(name, *arguments):
    try:
        jax.jit(kernel(*arguments)).trace(x).lower(lowering_platforms=("cuda",))
        outcome = "lowers"
    except ValueError as caught:
        outcome = f"ValueError: {str(caught)[:95]}"
    print(f"  {name}: {outcome}")
    return outcome == "lowers"


tiled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
plain = lowered("no layout cast")
cast = lowered("a layout cast of the loaded tile", (), plgpu.Layout.WGMMA)
described = lowered("no layout cast, but tiles and a swizzle", tiled)
if error > 1e-6:
    sys.exit("the behaviour changed: the interpreted kernel is wrong")
if plain or not cast or not described:
    sys.exit("the behaviour changed: other forms of the kernel lower")
PY
