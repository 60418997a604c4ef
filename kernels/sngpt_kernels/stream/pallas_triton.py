"""u = Σ wᵢ ⊙ xᵢ and n = scale · u / √(mean(u²) + eps) in one pass over memory, each way.

Forward, a program reads its rows of every xᵢ and writes u, n and one float32 per row, the inverse root. The backward pass computes u again from the xᵢ.
Backward, a program goes over `ROWS` rows, and writes dxᵢ and its sum of the gradients of w.
XLA adds these sums, so that the gradients repeat bit for bit. D is a power of two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sngpt_kernels.launch import launch

BLOCK = 4  # rows that a program holds at once
ROWS = 64  # rows that a backward program sums over


def _forward(*refs: Any, terms: int, eps: float, scale: float) -> None:
    xs, ws, (u_ref, n_ref, inverse_ref) = refs[:terms], refs[terms : 2 * terms], refs[2 * terms :]
    rows = pl.ds(pl.program_id(0) * BLOCK, BLOCK)
    u = sum(x[rows, :].astype(jnp.float32) * w[:][None].astype(jnp.float32) for x, w in zip(xs, ws))
    u_ref[rows, :] = u.astype(u_ref.dtype)
    u = u.astype(u_ref.dtype).astype(jnp.float32)  # the backward pass reads the rounded sum
    inverse = jax.lax.rsqrt(jnp.mean(u * u, axis=1) + eps)
    n_ref[rows, :] = (u * (scale * inverse)[:, None]).astype(n_ref.dtype)
    inverse_ref[rows] = inverse


def _backward(*refs: Any, terms: int, scale: float) -> None:
    xs, ws = refs[:terms], refs[terms : 2 * terms]
    inverse_ref, du_ref, dn_ref = refs[2 * terms : 2 * terms + 3]
    dxs, dws = refs[2 * terms + 3 : 3 * terms + 3], refs[3 * terms + 3 :]
    first = pl.program_id(0) * ROWS

    def block(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rows = pl.ds(first + i * BLOCK, BLOCK)
        terms32 = [x[rows, :].astype(jnp.float32) for x in xs]
        u = sum(x * w[:][None].astype(jnp.float32) for x, w in zip(terms32, ws))
        u = u.astype(du_ref.dtype).astype(jnp.float32)  # rounded as the forward pass rounds
        dn = dn_ref[rows, :].astype(jnp.float32)
        inverse = inverse_ref[rows][:, None]
        along = jnp.mean(dn * u, axis=1, keepdims=True) * (inverse * inverse)
        g = du_ref[rows, :].astype(jnp.float32) + scale * inverse * (dn - u * along)
        for dx, w in zip(dxs, ws):
            dx[rows, :] = (g * w[:][None].astype(jnp.float32)).astype(dx.dtype)
        return tuple(
            s + jnp.sum(g * x, axis=0) for s, x in zip(sums, terms32)
        )

    zeros = tuple(jnp.zeros(w.shape, jnp.float32) for w in ws)
    for dw, s in zip(dws, jax.lax.fori_loop(0, ROWS // BLOCK, block, zeros)):
        dw[pl.program_id(0), :] = s


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def sum_norm(xs: tuple, ws: tuple, eps: float, scale: float, interpret: bool = False) -> tuple:
    """u and n [N, D] of arrays xs [N, D] and weights ws [D]; `ROWS` divides N."""
    return _run_forward(xs, ws, eps, scale, interpret)[0]


def _run_forward(xs: tuple, ws: tuple, eps: float, scale: float, interpret: bool) -> tuple:
    N, D = xs[0].shape
    like = jax.ShapeDtypeStruct((N, D), xs[0].dtype)
    kernel = functools.partial(_forward, terms=len(xs), eps=eps, scale=scale)
    u, n, inverse = launch(
        "stream_forward", kernel, (N // BLOCK,), (*xs, *ws),
        (like, like, jax.ShapeDtypeStruct((N,), jnp.float32)),
        flops=6 * N * D, num_warps=4, interpret=interpret,
    )  # fmt: skip
    return (u, n), (xs, ws, inverse)


def _run_backward(eps: float, scale: float, interpret: bool, kept: tuple, grads: tuple) -> tuple:
    xs, ws, inverse = kept
    N, D = xs[0].shape
    kernel = functools.partial(_backward, terms=len(xs), scale=scale)
    like = tuple(jax.ShapeDtypeStruct((N, D), x.dtype) for x in xs)
    partial = tuple(jax.ShapeDtypeStruct((N // ROWS, D), jnp.float32) for _ in ws)
    out = launch(
        "stream_backward", kernel, (N // ROWS,), (*xs, *ws, inverse, *grads), (*like, *partial),
        flops=12 * N * D, num_warps=4, interpret=interpret,
    )  # fmt: skip
    dws = tuple(jnp.sum(d, axis=0).astype(w.dtype) for d, w in zip(out[len(xs) :], ws))
    return out[: len(xs)], dws


sum_norm.defvjp(_run_forward, _run_backward)
