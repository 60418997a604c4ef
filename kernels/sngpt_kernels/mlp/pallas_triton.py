"""The operation as matrix products whose epilogues do what XLA does in passes over memory.

| product | epilogue | writes |
|---|---|---|
| y out | adds x | u, and the sums of u² of each tile's rows |
| u up | divides by the norm, applies the activation | `kept`, which gives activation and slope |
| activation(kept) down | adds u | the result |
| backward: ds downᵀ | times the slope at `kept`, divides by the norm | h's gradient / norm |

The norm divides rows of a product instead of its operand, so n is never written. The gradients of
the matrices and of n are products of XLA, and the norm's gradient is a kernel of `stream`.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import CannotServe
from sngpt_kernels.launch import launch
from sngpt_kernels.mlp.api import OPERATION, tuned_entry
from sngpt_kernels.stream.pallas_triton import norm_gradient
from sngpt_kernels.tiles import exist, load, read, store


@dataclass(frozen=True)
class Config:
    """The tile of a program's result, the step of its loop, and what runs it."""

    rows: int = 128  # powers of two
    columns: int = 128
    inner: int = 64
    num_warps: int = 8
    num_stages: int = 3  # tiles of the operands in flight

    @classmethod
    def heuristic(cls) -> "Config":
        """Two programs share a multiprocessor of an H100, so that one's epilogue hides."""
        return cls()


@dataclass(frozen=True)
class Problem:
    """The static arguments of one call, for all its products."""

    length: int  # rows
    width: int  # D
    activation: str
    eps: float
    scale: float
    config: Config
    interpret: bool

    def keep(self, h: Array) -> Array:
        """The activation of h, negative where h is; its square root gives the slope."""
        below = 0.0 if self.activation == "relu2" else -0.25
        return jnp.where(h > 0, 1.0, below) * h * h

    def activated(self, kept: Array) -> Array:
        return kept if self.activation == "relu2" else jnp.abs(kept)

    def slope(self, kept: Array) -> Array:
        """The activation's derivative at h."""
        return jnp.where(kept > 0, 2.0, -1.0) * jnp.sqrt(jnp.abs(kept))

    def factor(self, squares_ref: Any, existing: Array | None) -> Array:
        """scale / norm of the rows, [rows, 1], from the sums of squares of u's tiles."""
        columns = (squares_ref.at[:, pl.ds(i, 1)] for i in range(squares_ref.shape[1]))
        total = functools.reduce(jnp.add, [load(column, existing) for column in columns])
        return self.scale * lax.rsqrt(total / self.width + self.eps)

    def product(
        self, epilogue: str, a: Array, b: Array, *tiles: Array, squares: Array | None = None
    ) -> list[Array]:
        """a [M, K] times b [K, N], or b [N, K] for `gradient`, through the epilogue: [M, N].

        The epilogue takes `tiles` [M, N] and the sums of squares of u's tiles, [M, _]. `out` has
        these sums as a second result.
        """
        c, K = self.config, a.shape[1]
        transposed, sums = epilogue == "gradient", epilogue == "out"
        N = b.shape[0 if transposed else 1]
        if N % c.columns or K % c.inner:
            tile = f"tiles of {c.columns} columns and steps of {c.inner}"
            raise CannotServe(f"pallas_triton: {tile} do not divide a product of {K} by {N}")
        tile_spec = pl.BlockSpec((c.rows, c.columns), lambda j, i: (i, j))
        b_spec = pl.BlockSpec((K, c.columns), lambda j, i: (0, j))
        if transposed:
            b_spec = pl.BlockSpec((c.columns, K), lambda j, i: (j, 0))
        specs = [pl.BlockSpec((c.rows, K), lambda j, i: (i, 0)), b_spec, *[tile_spec] * len(tiles)]
        if squares is not None:
            specs.append(pl.BlockSpec((c.rows, squares.shape[1]), lambda j, i: (i, 0)))
        results = [ShapeDtypeStruct((self.length, N), a.dtype)]
        if sums:
            results.append(ShapeDtypeStruct((self.length, N // c.columns), jnp.float32))
        computed: list[Array] = launch(
            f"mlp_{epilogue}",
            functools.partial(_kernel, problem=self, epilogue=epilogue),
            # neighbours share the rows of a, and b stays in the cache
            (N // c.columns, pl.cdiv(self.length, c.rows)),
            (a, b, *tiles, *(() if squares is None else (squares,))),
            tuple(results),
            flops=2 * self.length * N * K,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            interpret=self.interpret,
            in_specs=specs,
            out_specs=(tile_spec, *[pl.BlockSpec((c.rows, 1), lambda j, i: (i, j))] * sums),
        )
        return computed


def _kernel(a_ref: Any, b_ref: Any, *refs: Any, problem: Problem, epilogue: str) -> None:
    c, transposed = problem.config, epilogue == "gradient"
    existing = exist(problem.length, c.rows, axis=1)

    def step(k: Array, total: Array) -> Array:
        inner = pl.ds(k * c.inner, c.inner)
        a = read(a_ref.at[:, inner], existing)
        b = read(b_ref.at[:, inner] if transposed else b_ref.at[inner, :], None)
        if epilogue == "down":
            a = problem.activated(a)
        return total + plgpu.dot(a, b, trans_b=transposed)

    steps = a_ref.shape[1] // c.inner
    total = lax.fori_loop(0, steps, step, jnp.zeros((c.rows, c.columns), jnp.float32))
    if epilogue == "up":
        squares_ref, result_ref = refs
        total = problem.keep(total * problem.factor(squares_ref, existing))
    elif epilogue == "gradient":
        kept_ref, squares_ref, result_ref = refs
        total *= problem.slope(load(kept_ref, existing)) * problem.factor(squares_ref, existing)
    else:
        added_ref, result_ref = refs[:2]
        total += load(added_ref, existing)
    rounded = total.astype(result_ref.dtype)
    store(result_ref, rounded, existing)
    if epilogue == "out":
        squares = jnp.square(rounded.astype(jnp.float32))
        store(refs[2], jnp.sum(squares, axis=1, keepdims=True), existing)


def _forward(
    problem: Problem, x: Array, y: Array, out: Array, up: Array, down: Array
) -> tuple[Array, ...]:
    """The result, and what the gradient needs beside the arguments."""
    u, squares = problem.product("out", y, out, x)
    (kept,) = problem.product("up", u, up, squares=squares)
    (result,) = problem.product("down", kept, down, u)
    return result, u, squares, kept


def _backward(problem: Problem, saved: tuple[Array, ...], ds: Array) -> tuple[Array, ...]:
    y, out, up, down, u, squares, kept = saved
    (dh,) = problem.product("gradient", ds, down, kept, squares=squares)
    ddown = jnp.einsum("nf,nd->fd", problem.activated(kept), ds)
    du = norm_gradient(u, ds, dh @ up.T, problem.eps, problem.interpret)
    return (du, du @ out.T, jnp.einsum("ne,nd->ed", y, du), jnp.einsum("nd,nf->df", u, dh), ddown)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_mlp(problem: Problem, *arrays: Array) -> Array:
    return _forward(problem, *arrays)[0]


def _residual_mlp_forward(problem: Problem, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    forward = dispatch.without_derivative(OPERATION, functools.partial(_forward, problem))
    result, *kept = forward(*arrays)
    return result, (*arrays[1:], *kept)


def _residual_mlp_backward(
    problem: Problem, saved: tuple[Array, ...], ds: Array
) -> tuple[Array, ...]:
    backward = dispatch.without_derivative(OPERATION, functools.partial(_backward, problem))
    gradients: tuple[Array, ...] = backward(saved, ds)
    return gradients


_residual_mlp.defvjp(_residual_mlp_forward, _residual_mlp_backward)


def residual_mlp(
    x: Array,
    y: Array,
    out: Array,
    up: Array,
    down: Array,
    activation: str,
    eps: float,
    scale: float,
    config: Config | None = None,
    interpret: bool = False,
) -> Array:
    """`api.residual_mlp` of valid arguments. `interpret` serves any device."""
    width, hidden = up.shape
    if config is None:
        entry = tuned_entry(dispatch.current_device(), x.dtype, width, hidden)
        config = Config(**entry["config"]) if "config" in entry else Config.heuristic()
    rows = math.prod(x.shape[:-1])
    problem = Problem(rows, width, activation, eps, scale, config, interpret)
    flat = x.reshape(rows, width), y.reshape(rows, -1)
    return _residual_mlp(problem, *flat, out, up, down).reshape(x.shape)
