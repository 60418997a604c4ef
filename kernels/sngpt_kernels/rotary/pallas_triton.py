"""The operation as two Pallas Triton kernels, one pass over memory in each direction.

A program takes some positions of all heads. It loads the positions' cosines and sines once.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.experimental import pallas as pl

from sngpt_kernels import dispatch
from sngpt_kernels.launch import launch
from sngpt_kernels.rotary.api import OPERATION, tuned_entry
from sngpt_kernels.tiles import Config as Config
from sngpt_kernels.tiles import dot, exist, load, spans, store


@dataclass(frozen=True)
class Problem:
    """The static arguments of one call, for both kernels."""

    batch: int
    length: int  # T
    heads: int  # H, of queries
    keys: int  # K, the heads of keys
    values: tuple[int, ...]  # counts of the other heads, which are copied
    head_size: int
    half: int  # r/2
    tables: int  # the tables' first axis: 1 or B
    eps: float
    config: Config
    interpret: bool

    def columns(self) -> list[slice]:
        """The spans of a head: of first halves, then of second halves, then of the rest."""
        rest = spans(2 * self.half, self.head_size - 2 * self.half)
        return [*spans(0, self.half), *spans(self.half, self.half), *rest]

    def head(self, ref: Any, head: Array, existing: Array | None) -> list[Array]:
        """The spans of a head."""
        return [load(ref.at[:, head, columns], existing) for columns in self.columns()]

    def turn(self, parts: list[Array], tables: list[tuple[Array, Array]], way: int) -> list[Array]:
        """The rotated spans; `way` is 1, or -1 for the inverse."""
        n = len(tables)
        triples = list(zip(parts[:n], parts[n : 2 * n], tables, strict=True))
        first = [a * cos + b * (way * sin) for a, b, (cos, sin) in triples]
        second = [b * cos - a * (way * sin) for a, b, (cos, sin) in triples]
        return [*first, *second, *parts[2 * n :]]

    def angles(
        self, cos_ref: Any, sin_ref: Any, existing: Array | None
    ) -> list[tuple[Array, Array]]:
        """The cosines and sines of each span of a half."""
        tiles = (tuple(r.at[:, part] for r in (cos_ref, sin_ref)) for part in spans(0, self.half))
        return [(load(cos, existing), load(sin, existing)) for cos, sin in tiles]

    def copied(self, refs: list[Any]) -> Iterator[tuple[int, int, Any]]:
        """Of each array of values: its number of heads, and the first among all heads."""
        first = self.heads + self.keys
        for count, ref in zip(self.values, refs, strict=True):
            yield count, first, ref
            first += count

    def inverse_norm(self, parts: list[Array]) -> Array:
        """[rows, 1]."""
        return lax.rsqrt(dot(parts, parts) / self.head_size + self.eps)

    def specs(self) -> tuple[pl.BlockSpec, ...]:
        """The specs of queries, keys, values …, all heads side by side, a table, and the gain."""
        rows, per_row = self.config.rows, self.tables > 1

        def heads(count: int) -> pl.BlockSpec:
            return pl.BlockSpec((None, rows, count, self.head_size), lambda i, b: (b, i, 0, 0))

        table = pl.BlockSpec((None, rows, self.half), lambda i, b: (b if per_row else 0, i, 0))
        gain = pl.BlockSpec((self.heads,), lambda i, b: (0,))
        counts = self.heads, self.keys, *self.values
        return (*map(heads, (*counts, sum(counts))), table, gain)

    def launch(self, name: str, kernel: Any, inputs: Any, results: Any, **specs: Any) -> Any:
        size = self.batch * self.length * (self.heads + self.keys)
        return launch(
            name,
            functools.partial(kernel, problem=self),
            (pl.cdiv(self.length, self.config.rows), self.batch),
            inputs,
            results,
            flops=10 * size * self.head_size,
            transcendentals=size,
            num_warps=self.config.num_warps,
            interpret=self.interpret,
            **specs,
        )


def copy(
    problem: Problem,
    count: int,
    source: Any,
    first: int,
    target: Any,
    to: int,
    existing: Array | None,
) -> None:
    """Copies heads, which begin at `first` and at `to`."""

    @pl.loop(0, count)
    def _value(head: Array) -> None:
        parts = problem.head(source, first + head, existing)
        for columns, values in zip(problem.columns(), parts, strict=True):
            store(target.at[:, to + head, columns], values, existing)


def _forward_kernel(*refs: Any, problem: Problem) -> None:
    x_ref, gain_ref, cos_ref, sin_ref, q_ref, k_ref, *v_refs = refs
    existing = exist(problem.length, problem.config.rows)
    tables = problem.angles(cos_ref, sin_ref, existing)

    def one(head: Array, out_ref: Any, to: Array, gain: Array | float) -> None:
        parts = problem.head(x_ref, head, existing)
        scale = problem.inverse_norm(parts) * gain
        turned = problem.turn(parts, tables, 1)
        for columns, values in zip(problem.columns(), turned, strict=True):
            store(out_ref.at[:, to, columns], values * scale, existing)

    @pl.loop(0, problem.heads)
    def _query(head: Array) -> None:
        one(head, q_ref, head, gain_ref[head])

    @pl.loop(0, problem.keys)
    def _key(head: Array) -> None:
        one(problem.heads + head, k_ref, head, 1.0)

    for count, first, ref in problem.copied(v_refs):
        copy(problem, count, x_ref, first, ref, 0, existing)


def _backward_kernel(*refs: Any, problem: Problem) -> None:
    x_ref, gain_ref, cos_ref, sin_ref, dq_ref, dk_ref, *dv_refs, dx_ref, dgain_ref = refs
    existing = exist(problem.length, problem.config.rows)
    tables = problem.angles(cos_ref, sin_ref, existing)

    def one(head: Array, cotangent_ref: Any, at: Array, gain: Array | float) -> Array:
        parts = problem.head(x_ref, head, existing)
        dturned = problem.turn(problem.head(cotangent_ref, at, existing), tables, -1)
        inverse = problem.inverse_norm(parts)
        along = dot(dturned, parts) * inverse  # with the normalized head, before the gain
        back = along * inverse / problem.head_size
        for columns, d, x in zip(problem.columns(), dturned, parts, strict=True):
            store(dx_ref.at[:, head, columns], (d - x * back) * (inverse * gain), existing)
        return jnp.sum(along)

    @pl.loop(0, problem.heads)
    def _query(head: Array) -> None:
        dgain_ref[head] = one(head, dq_ref, head, gain_ref[head])

    @pl.loop(0, problem.keys)
    def _key(head: Array) -> None:
        one(problem.heads + head, dk_ref, head, 1.0)

    for count, first, ref in problem.copied(dv_refs):
        copy(problem, count, ref, 0, dx_ref, first, existing)


def _forward(problem: Problem, x: Array, gain: Array, cos: Array, sin: Array) -> Any:
    *parts, both, table, gains = problem.specs()
    counts = problem.heads, problem.keys, *problem.values
    results = tuple(ShapeDtypeStruct((*x.shape[:2], n, x.shape[3]), x.dtype) for n in counts)
    return problem.launch(
        "rotary_forward",
        _forward_kernel,
        (x, gain, cos, sin),
        results,
        in_specs=[both, gains, table, table],
        out_specs=tuple(parts),
    )


def _backward(problem: Problem, saved: tuple[Array, ...], cotangents: tuple[Array, ...]) -> Any:
    """The gradients of x and of the gain. Each program sums the gain's gradient over its rows."""
    x = saved[0]
    *parts, both, table, gains = problem.specs()
    programs = pl.cdiv(problem.length, problem.config.rows)
    sums = pl.BlockSpec((None, None, problem.heads), lambda i, b: (b, i, 0))
    dx, dgain = problem.launch(
        "rotary_backward",
        _backward_kernel,
        (*saved, *cotangents),
        (
            ShapeDtypeStruct(x.shape, x.dtype),
            ShapeDtypeStruct((problem.batch, programs, problem.heads), jnp.float32),
        ),
        in_specs=[both, gains, table, table, *parts],
        out_specs=(both, sums),
    )
    return dx, jnp.sum(dgain, axis=(0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _prepare(x: Array, gain: Array, cos: Array, sin: Array, problem: Problem) -> Any:
    return _forward(problem, x, gain, cos, sin)


def _prepare_forward(x: Array, gain: Array, cos: Array, sin: Array, problem: Problem) -> Any:
    saved = (x, gain, cos, sin)
    forward = functools.partial(_forward, problem)
    return dispatch.without_derivative(OPERATION, forward)(*saved), saved


def _prepare_backward(problem: Problem, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    gradients = functools.partial(_backward, problem)
    return *dispatch.without_derivative(OPERATION, gradients)(saved, cotangents), None, None


_prepare.defvjp(_prepare_forward, _prepare_backward)


def prepare(
    x: Array,
    gain: Array,
    cos: Array,
    sin: Array,
    eps: float,
    values: tuple[int, ...] = (),
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`api.prepare` of valid arguments. `interpret` serves any device."""
    B, T, N, h = x.shape
    if config is None:
        entry = tuned_entry(dispatch.current_device(), x.dtype, h)
        config = Config(**entry["config"]) if "config" in entry else Config.heuristic()
    H = gain.shape[0]
    heads, tables = (H, N - H - sum(values), values, h), (cos.shape[2], cos.shape[0])
    problem = Problem(B, T, *heads, *tables, eps, config, interpret)
    return _prepare(x, gain, cos, sin, problem)
