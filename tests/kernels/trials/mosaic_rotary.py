"""The forward pass of `rotary.prepare` in Mosaic GPU, as jax 0.12 spells it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # positions per block, as many as a warpgroup's tile of a matrix product has


def prepare(
    x: Array, gain: Array, cos: Array, sin: Array, *, eps: float, interpret: Any = None
) -> Array:
    """The heads of `rotary.api.prepare` side by side, [B, T, H + K, h]; 64 divides T.

    A block copies one head after the other to shared memory while it computes the head before.
    """
    B, T, N, h = x.shape
    half = cos.shape[-1]
    cuts = [slice(0, half), slice(half, 2 * half), slice(2 * half, h)]
    cuts = [cut for cut in cuts if cut.start < cut.stop]
    gains = jnp.concatenate([gain, jnp.ones(N - gain.shape[0])])
    # Without tiles as wide as the cuts no load compiles, and the search for one takes minutes.
    layout: list[Any] = [plgpu.TilingTransform((8, half))]
    if (swizzle := half * x.dtype.itemsize) > 16:  # narrower rows need none
        layout.append(plgpu.SwizzleTransform(swizzle))
    heads = plgpu.SMEM((2, ROWS, h), x.dtype, transforms=tuple(layout))

    def body(*refs: Any) -> None:
        x_ref, gain_ref, cos_ref, sin_ref, out_ref, raw, ready, arrived = refs
        b, rows = lax.axis_index("batch"), pl.ds(lax.axis_index("tile") * ROWS, ROWS)
        c, s = (plgpu.load(table.at[0, rows], optimized=False) for table in (cos_ref, sin_ref))

        def fetch(n: Array | int, slot: Array | int) -> None:
            plgpu.copy_gmem_to_smem(x_ref.at[b, rows, n], raw.at[slot], arrived.at[slot])

        fetch(0, 0)

        @pl.loop(0, N)
        def _head(n: Array) -> None:
            slot = n % 2
            pl.when(n + 1 < N)(lambda: fetch(n + 1, 1 - slot))
            plgpu.barrier_wait(arrived.at[slot])
            first, second, *rest = (raw[slot, :, cut].astype(jnp.float32) for cut in cuts)
            sums = [jnp.sum(part * part, axis=1) for part in (first, second, *rest)]
            squares = functools.reduce(jnp.add, sums)
            scale = (lax.rsqrt(squares / h + eps) * gain_ref[n])[:, None]
            turned = [first * c + second * s, second * c - first * s, *rest]
            plgpu.wait_smem_to_gmem(1)  # the copy before the last has read this slot
            for cut, values in zip(cuts, turned, strict=True):
                ready[slot, :, cut] = (values * scale).astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ready.at[slot], out_ref.at[b, rows, n])

        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[heads, heads, plgpu.Barrier(num_barriers=2)],
        grid=(B, T // ROWS),
        grid_names=("batch", "tile"),
        interpret=interpret,
    )(x, gains, cos, sin)
