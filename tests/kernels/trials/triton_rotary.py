"""The forward pass of `rotary.prepare` in Triton's own language, called by jax_triton 0.4."""

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jax import Array


@triton.jit
def rotary_kernel(
    x_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    length,
    heads,
    out_ptr,  # results follow all operands
    h: tl.constexpr,
    half: tl.constexpr,
    rest: tl.constexpr,
    width: tl.constexpr,
    eps: tl.constexpr,
    rows: tl.constexpr,
):
    dtype = out_ptr.dtype.element_ty
    t = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    exist = t < length
    pair = tl.arange(0, half)[None, :]
    last = tl.arange(0, width)[None, :]
    remain = exist & (last < rest)
    c = tl.load(cos_ptr + t * half + pair, mask=exist, other=0.0)
    s = tl.load(sin_ptr + t * half + pair, mask=exist, other=0.0)
    start = (tl.program_id(1) * length + t) * heads * h
    for n in range(heads):
        first = start + n * h + pair
        after = start + n * h + 2 * half + last
        a = tl.load(x_ptr + first, mask=exist, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + first + half, mask=exist, other=0.0).to(tl.float32)
        r = tl.load(x_ptr + after, mask=remain, other=0.0).to(tl.float32)
        squares = tl.sum(a * a + b * b, axis=1) + tl.sum(r * r, axis=1)
        scale = (tl.rsqrt(squares / h + eps) * tl.load(gain_ptr + n))[:, None]
        tl.store(out_ptr + first, ((a * c + b * s) * scale).to(dtype), mask=exist)
        tl.store(out_ptr + first + half, ((b * c - a * s) * scale).to(dtype), mask=exist)
        tl.store(out_ptr + after, (r * scale).to(dtype), mask=remain)


def prepare(
    x: Array, gain: Array, cos: Array, sin: Array, *, eps: float, capability: int | None = None
) -> Array:
    """The heads of `rotary.api.prepare` side by side, [B, T, H + K, h]; r/2 is a power of two.

    `capability`, such as 90, compiles for a GPU that is not in the machine.
    """
    B, T, N, h = x.shape
    half, rows = cos.shape[-1], 32
    rest = h - 2 * half
    return jax_triton.triton_call(
        x,
        jnp.concatenate([gain, jnp.ones(N - gain.shape[0])]),
        cos,
        sin,
        T,
        N,
        kernel=rotary_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(triton.cdiv(T, rows), B),
        h=h,
        half=half,
        rest=rest,
        width=triton.next_power_of_2(max(1, rest)),  # of a tile
        eps=eps,
        rows=rows,
        num_warps=4,
        compute_capability=capability,
    )
