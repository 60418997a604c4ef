"""The operation as two Pallas Triton kernels, one pass over memory in each direction.

The backward kernel computes the sum again from the arrays, which the gradients of the weights need
anyway. Without weights it reads the rounded sum instead, so that the arrays need not be kept. A
program sums the gradients of the vectors over its rows. XLA adds the programs' sums, so the
gradients are the same in every run. The kernel also adds the cotangents of n's uses, and reads no
cotangent that is zero.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct, lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from sngpt_kernels import dispatch
from sngpt_kernels.launch import launch
from sngpt_kernels.stream.api import OPERATION, tuned_entry
from sngpt_kernels.tiles import dot, load, spans, store

Groups = tuple[tuple[Array, ...], ...]
Weights = tuple[Array | None, ...]


@dataclass(frozen=True)
class Config:
    """What one program takes, and what runs it."""

    rows: int = 4  # that a program holds at once; a power of two
    sums: int = 128  # rows of a backward program; a multiple of `rows`
    num_warps: int = 4

    @classmethod
    def heuristic(cls, width: int) -> "Config":
        """A thread of the four warps holds 16 elements of an array, which are 32 or 64 bytes.

        The widest rows have more elements than that, and the narrowest fill a backward program.
        """
        rows = min(max(2048 // width, 1), cls.sums)
        return cls(rows=1 << rows.bit_length() - 1)


def _config(dtype: jnp.dtype, width: int) -> Config:
    """The entry of the device's table, or `heuristic` if it has none."""
    entry = tuned_entry(dispatch.current_device(), dtype, width)
    return Config(**entry["config"]) if "config" in entry else Config.heuristic(width)


@dataclass(frozen=True)
class Problem:
    """The static arguments of one call, for both kernels."""

    length: int  # rows
    width: int  # D
    groups: tuple[tuple[int, bool], ...]  # each group's number of arrays, and if it has a weight
    gain: bool
    first: bool  # whether the first group's own sum is a result, or has a cotangent
    cotangents: tuple[bool, int]  # whether u has one, and how many n has
    eps: float
    scale: float
    config: Config
    interpret: bool
    divided: bool = False  # whether the cotangents of n are divided by the norm already

    @property
    def is_sum(self) -> bool:
        """Whether u is another array than the first one, so that it is written."""
        return self.groups != ((1, False),)

    @property
    def spans(self) -> list[slice]:
        return list(spans(0, self.width))

    def terms(self, refs: tuple[Any, ...]) -> tuple[list[tuple[Any, list[Any]]], Any, list[Any]]:
        """Each group's weight and arrays, the gain, and the rest of the references."""
        left = iter(refs)
        arrays = [[next(left) for _ in range(count)] for count, _ in self.groups]
        weights = [next(left) if weighted else None for _, weighted in self.groups]
        gain = next(left) if self.gain else None
        return list(zip(weights, arrays, strict=True)), gain, list(left)

    def exist(self, first: Any) -> Array | None:
        """Which of the rows from `first` on exist, [rows, 1]; None means all."""
        rows = self.config.rows
        if self.length % self.config.sums == 0:
            return None
        return first + lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < self.length

    def inner(self, arrays: list[Any], rows: Any, exist: Array | None) -> list[Array]:
        """The sum of a group's arrays; 1 if it has none."""
        if not arrays:
            return [jnp.ones((self.config.rows, c.stop - c.start)) for c in self.spans]
        tiles = ([load(x.at[rows, c], exist) for x in arrays] for c in self.spans)
        return [functools.reduce(jnp.add, parts) for parts in tiles]

    def total(self, inner: list[list[Array]], weights: list[Any], dtype: Any) -> list[Array]:
        """The groups' sum, rounded to the dtype of the result."""
        weighted = (self.times(parts, w) for parts, w in zip(inner, weights, strict=True))
        sums = (functools.reduce(jnp.add, parts) for parts in zip(*weighted, strict=True))
        return [part.astype(dtype).astype(jnp.float32) for part in sums]

    def times(self, parts: list[Array], vector: Any) -> list[Array]:
        """A row times a vector [D], or 1 if it is None."""
        if vector is None:
            return parts
        return [x * load(vector.at[c], None)[None] for x, c in zip(parts, self.spans, strict=True)]

    def inverse_norm(self, u: list[Array]) -> Array:
        """[rows, 1]."""
        return lax.rsqrt(dot(u, u) / self.width + self.eps)

    def launch(self, name: str, kernel: Any, rows: int, inputs: Any, results: Any) -> Any:
        """Runs the kernel on so many rows per program. Vectors are whole, sums per program."""

        def spec(array: Any) -> pl.BlockSpec:
            if array.ndim == 1:
                return pl.BlockSpec((self.width,), lambda i: (0,))
            if array.ndim == 3:
                return pl.BlockSpec((None, *array.shape[1:]), lambda i: (i, 0, 0))
            return pl.BlockSpec((rows, self.width), lambda i: (i, 0))

        return launch(
            name,
            functools.partial(kernel, problem=self),
            (pl.cdiv(self.length, rows),),
            inputs,
            results,
            flops=8 * self.length * self.width,
            transcendentals=self.length,
            num_warps=self.config.num_warps,
            interpret=self.interpret,
            in_specs=[spec(array) for array in inputs],
            out_specs=tuple(spec(array) for array in results),
        )


def _forward_kernel(*refs: Any, problem: Problem) -> None:
    terms, gain, results = problem.terms(refs)
    u_ref, (n_ref, *first_ref) = results[: problem.is_sum], results[problem.is_sum :]
    exist = problem.exist(pl.program_id(0) * problem.config.rows)
    inner = [problem.inner(arrays, slice(None), exist) for _, arrays in terms]
    u = problem.total(inner, [weight for weight, _ in terms], n_ref.dtype)
    factor = problem.scale * problem.inverse_norm(u)
    n = problem.times([part * factor for part in u], gain)
    for targets, parts in ((u_ref, u), ([n_ref], n), (first_ref, inner[0])):
        for ref in targets:
            for columns, part in zip(problem.spans, parts, strict=True):
                store(ref.at[:, columns], part, exist)


def _backward_kernel(*refs: Any, problem: Problem) -> None:
    terms, gain, left = problem.terms(refs)
    has_du, uses = problem.cotangents
    ends = uses, uses + has_du, uses + has_du + problem.first
    dns, dus, dfirst = left[: ends[0]], left[ends[0] : ends[1]], left[ends[1] : ends[2]]
    results = left[ends[2] :]
    weights = [weight for weight, _ in terms]
    rows, first = problem.config.rows, pl.program_id(0) * problem.config.sums
    vectors = sum(weight is not None for weight in (*weights, gain))

    def block(i: Array, sums: list[list[Array]]) -> list[list[Array]]:
        at = pl.ds(i * rows, rows)
        exist = problem.exist(first + i * rows)
        inner = [problem.inner(arrays, at, exist) for _, arrays in terms]
        u = problem.total(inner, weights, dns[0].dtype)
        inverse = problem.inverse_norm(u)
        dn = [part * problem.scale for part in problem.inner(dns, at, exist)]
        dunit = problem.times(dn, gain)
        along = dot(dunit, u) * inverse * inverse / problem.width
        g = [a - b * along for a, b in zip(dunit, u, strict=True)]
        g = g if problem.divided else [inverse * part for part in g]
        if dus:
            g = [a + b for a, b in zip(g, problem.inner(dus, at, exist), strict=True)]
        outputs = iter(results)
        for i_group, (weight, arrays) in enumerate(terms):
            if arrays:
                out, parts = next(outputs), problem.times(g, weight)
                if dfirst and i_group == 0:
                    more = problem.inner(dfirst, at, exist)
                    parts = [a + b for a, b in zip(parts, more, strict=True)]
                for columns, part in zip(problem.spans, parts, strict=True):
                    store(out.at[at, columns], part, exist)
        of_vectors = [(g, part) for part, w in zip(inner, weights, strict=True) if w is not None]
        if gain is not None:
            of_vectors.append((dn, [part * inverse for part in u]))
        return [
            [s + a * b for s, a, b in zip(total, *pair, strict=True)]
            for total, pair in zip(sums, of_vectors, strict=True)
        ]

    # tiles of as many rows, which are added up once, at the end
    zeros = [jnp.zeros((rows, c.stop - c.start)) for c in problem.spans]
    totals = lax.fori_loop(0, problem.config.sums // rows, block, [zeros] * vectors)
    for which, total in enumerate(totals):
        for columns, part in zip(problem.spans, total, strict=True):
            one = results[-1].at[pl.ds(which, 1), columns]
            store(one, jnp.sum(part, axis=0, keepdims=True), None)


def _flat(groups: Groups, weights: Weights, gain: Array | None) -> tuple[Array, ...]:
    vectors = (vector for vector in (*weights, gain) if vector is not None)
    return (*(x for group in groups for x in group), *vectors)


def _forward(
    problem: Problem, groups: Groups, weights: Weights, gain: Array | None
) -> tuple[Array, ...]:
    x, *others = groups[0]
    written = problem.first and bool(others)  # a sum of one array is there already
    results = (ShapeDtypeStruct(x.shape, x.dtype),) * (1 + problem.is_sum + written)
    inputs = _flat(groups, weights, gain)
    rows = problem.config.rows
    computed = problem.launch("stream_forward", _forward_kernel, rows, inputs, results)
    there = (x,) * (not problem.is_sum), (x,) * (problem.first and not written)
    return *there[0], *computed, *there[1]


def _backward(
    problem: Problem, saved: tuple[Groups, Weights, Array | None], cotangents: list[Array]
) -> tuple[list[Array], list[Array]]:
    """The gradient that each group's arrays share, of groups with arrays, and of the vectors."""
    inputs = (*_flat(*saved), *cotangents)
    like, vectors = cotangents[0], sum(array.ndim == 1 for array in inputs)
    results = [ShapeDtypeStruct(like.shape, like.dtype) for group in saved[0] if group]
    if vectors:
        programs = pl.cdiv(problem.length, problem.config.sums)
        results.append(ShapeDtypeStruct((programs, vectors, problem.width), jnp.float32))
    gradients = problem.launch(
        "stream_backward", _backward_kernel, problem.config.sums, inputs, results
    )
    if not vectors:
        return gradients, []
    return gradients[:-1], list(jnp.sum(gradients[-1], axis=0))


def _repeated(problem: Problem, u: Array, n: Array, *first: Array) -> tuple[Array, ...]:
    return u, *(n,) * problem.cotangents[1], *first


def norm_gradient(u: Array, du: Array, dn: Array, eps: float, interpret: bool) -> Array:
    """The gradient of u [N, D] from its cotangent and that of its norm, over the norm: `dn`."""
    length, width = u.shape
    config = _config(u.dtype, width)
    problem = Problem(
        *(length, width, ((1, False),), False, False, (True, 1), eps, 1.0, config, interpret),
        divided=True,
    )
    (gradient,), _ = _backward(problem, (((u,),), (None,), None), [dn, du])
    return gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sum_norm(groups: Groups, weights: Weights, gain: Array | None, problem: Problem) -> Any:
    return _repeated(problem, *_forward(problem, groups, weights, gain))


def _sum_norm_forward(groups: Any, weights: Any, gain: Any, problem: Problem) -> Any:
    groups, weights, gain = jax.tree.map(lambda primal: primal.value, (groups, weights, gain))
    forward = dispatch.without_derivative(OPERATION, functools.partial(_forward, problem))
    u, n, *first = forward(groups, weights, gain)
    weighted = problem.first or any(weight is not None for weight in weights)
    kept = (groups if weighted else ((u,),), weights if weighted else (None,), gain)
    return _repeated(problem, u, n, *first), kept


def _sum_norm_backward(problem: Problem, saved: Any, cotangents: Any) -> tuple[Any, ...]:
    groups, weights, _ = saved
    inner = tuple((len(group), w is not None) for group, w in zip(groups, weights, strict=True))
    du, *dns = cotangents
    dfirst = [dns.pop()] if problem.first else []
    given = [[d for d in ds if not isinstance(d, SymbolicZero)] for ds in (dns, [du], dfirst)]
    given[0] = given[0] or [jnp.zeros(du.shape, du.dtype)]
    mine = replace(
        problem, groups=inner, first=bool(given[2]), cotangents=(bool(given[1]), len(given[0]))
    )
    gradients = dispatch.without_derivative(OPERATION, functools.partial(_backward, mine))
    dgroups, dvectors = gradients(saved, [*given[0], *given[1], *given[2]])
    # without weights all arrays share one gradient
    of_arrays = iter(
        dgroups if len(groups) == len(problem.groups) else dgroups * len(problem.groups)
    )
    of_vectors = iter(dvectors)
    return (
        tuple((next(of_arrays),) * count if count else () for count, _ in problem.groups),
        tuple(next(of_vectors) if weighted else None for _, weighted in problem.groups),
        next(of_vectors) if problem.gain else None,
    )


_sum_norm.defvjp(_sum_norm_forward, _sum_norm_backward, symbolic_zeros=True)


def sum_norm(
    groups: Groups,
    weights: Weights,
    gain: Array | None,
    eps: float,
    scale: float,
    uses: int = 1,
    first: bool = False,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`api.sum_norm` of valid arguments. `interpret` serves any device."""
    shape, dtype = groups[0][0].shape, groups[0][0].dtype
    config = config or _config(dtype, shape[-1])
    flat = tuple(tuple(x.reshape(-1, shape[-1]) for x in group) for group in groups)
    kinds = tuple((len(group), w is not None) for group, w in zip(groups, weights, strict=True))
    length, results = math.prod(shape[:-1]), (True, uses)
    problem = Problem(
        length, shape[-1], kinds, gain is not None, first, results, eps, scale, config, interpret
    )
    return tuple(x.reshape(shape) for x in _sum_norm(flat, weights, gain, problem))
