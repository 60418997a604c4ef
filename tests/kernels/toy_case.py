"""A small operation with a Pallas Triton kernel, which the commands' tests inspect and time: x @ w
for x [1024, 64].
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from sngpt_kernels.case import Case, Cost
from sngpt_kernels.dispatch import check_nvidia, current_device

ROWS, WIDTH, BLOCK = 1024, 64, 64


def _kernel(x_ref, w_ref, o_ref):
    o_ref[...] = plgpu.dot(x_ref[...], w_ref[...]).astype(o_ref.dtype)


@jax.custom_vjp
def _pallas(x, w):
    rows = pl.BlockSpec((BLOCK, WIDTH), lambda i: (i, 0))
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(len(x) // BLOCK,),
        in_specs=[rows, pl.BlockSpec((WIDTH, WIDTH), lambda i: (0, 0))],
        out_specs=rows,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name="toy_kernel",
    )(x, w)


_pallas.defvjp(
    lambda x, w: (_pallas(x, w), (x, w)),
    lambda saved, dy: (_pallas(dy, saved[1].T), saved[0].T @ dy),
)


def run(x, w, *, implementation):
    if implementation == "xla":
        return x @ w
    check_nvidia(implementation, current_device())
    return _pallas(x, w)


def make(key):
    of_x, of_w = jax.random.split(key)
    x = jax.random.normal(of_x, (ROWS, WIDTH), jnp.bfloat16)
    return x, jax.random.normal(of_w, (WIDTH, WIDTH), jnp.bfloat16)


def reference(x, w):
    return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


FLOPS, BYTES = 2 * ROWS * WIDTH * WIDTH, 2 * 2 * ROWS * WIDTH
CASE = Case(
    name="toy",
    make=make,
    run=run,
    differentiated=(0, 1),
    reference=reference,
    implementations=("xla", "pallas_triton"),
    forward=Cost(FLOPS, BYTES),
    backward=Cost(2 * FLOPS, 2 * BYTES),
)
