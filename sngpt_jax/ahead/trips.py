"""How often the loops of kernels run: counted while they are interpreted on this machine.

The trips of most loops are known from the kernel's configuration. The others depend on the data,
such as a bisection's. A case runs on typical arguments, and every loop of its kernels counts.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import Device

from sngpt_jax.ahead import sass


@dataclass
class Loop:
    """A loop of a kernel, or the whole kernel, whose one trip is a program."""

    name: str  # of the function that is its body
    fixed: bool  # its trips do not depend on the data
    inside: list["Loop"] = field(default_factory=list)  # in the order of the code
    entries: int = 0
    trips: int = 0  # over all entries

    def count(self, trips: Any) -> None:
        self.entries += 1
        self.trips += int(trips)


@contextlib.contextmanager
def counting() -> Iterator[dict[str, Loop]]:
    """Inside, kernels that are interpreted count their loops, by the kernels' names."""
    kernels: dict[str, Loop] = {}
    around: list[Loop] = []  # the loops whose bodies are being traced
    pallas_call, while_loop, fori_loop = pl.pallas_call, lax.while_loop, lax.fori_loop

    def body_of(loop: Loop, function: Callable[..., Any]) -> Callable[..., Any]:
        def body(*arguments: Any) -> Any:
            loop.inside.clear()  # jax may trace a body again
            around.append(loop)
            try:
                return function(*arguments)
            finally:
                around.pop()

        return body

    def counted_call(
        kernel: Any, *rest: Any, name: str, grid: tuple[int, ...], **options: Any
    ) -> Any:
        programs = math.prod(grid)
        loop = kernels[name] = Loop(name, True, entries=programs, trips=programs)
        return pallas_call(body_of(loop, kernel), *rest, name=name, grid=grid, **options)

    def counted_while(go_on: Any, function: Any, start: Any) -> Any:
        if not around:  # a loop of the interpreter
            return while_loop(go_on, function, start)
        loop = Loop(function.__name__, fixed=False)
        around[-1].inside.append(loop)
        body = body_of(loop, function)
        trips, end = while_loop(
            lambda state: go_on(state[1]),
            lambda state: (state[0] + 1, body(state[1])),
            (jnp.int32(0), start),
        )
        jax.debug.callback(loop.count, trips)
        return end

    def counted_fori(low: Any, high: Any, function: Any, start: Any, **options: Any) -> Any:
        if not around:
            return fori_loop(low, high, function, start, **options)
        loop = Loop(function.__name__, fixed=isinstance(low, int) and isinstance(high, int))
        around[-1].inside.append(loop)
        jax.debug.callback(loop.count, high - low)
        return fori_loop(low, high, body_of(loop, function), start, **options)

    with (
        mock.patch.object(pl, "pallas_call", counted_call),
        mock.patch.object(lax, "while_loop", counted_while),
        mock.patch.object(lax, "fori_loop", counted_fori),
    ):
        yield kernels
        jax.effects_barrier()


def of(interpret: Callable[[], Any], device: Device) -> dict[str, Loop]:
    """The loops of the kernels that `interpret` runs with the block sizes of the device."""
    with dispatch.targeting(device), counting() as kernels:
        interpret()
    return kernels


@dataclass(frozen=True)
class Row:
    """A loop's code beside that of the loops inside, or the code around the loops of a kernel."""

    loop: str
    depth: int  # loops around it
    trips: float  # per program, of the machine code
    unrolled: float | None  # trips of the kernel per trip of the machine code; None: not readable
    instructions: int  # per trip of the machine code
    barriers: float  # per program, of a warp
    warp_instructions: float  # per program, of a warp
    shares: dict[str, float]  # the same by kind of work


def _without_unrolled(loop: Loop, left: int) -> list[Loop]:
    """The loops inside a loop of which `left` are loops in the machine code.

    The compiler unrolls loops of few trips completely, the ones of the fewest trips first.
    """
    able = [inner for inner in loop.inside if inner.fixed and inner.entries and not inner.inside]
    able.sort(key=lambda inner: inner.trips / inner.entries)
    gone = [id(inner) for inner in able[: max(len(loop.inside) - left, 0)]]
    return [inner for inner in loop.inside if id(inner) not in gone]


def rows(code: sass.Loop, counted: Loop, work: Mapping[str, tuple[str, str]]) -> list[Row]:
    """The code of a kernel by loop.

    `work` has, per name of a loop, the kind of work of its code and of the code after it. Code up
    to the last instruction on tensor cores is the work "products".

    Raises RuntimeError if the loops of the machine code are not those that were counted.
    """
    programs = counted.trips
    result: list[Row] = []

    def add(code: sass.Loop, loop: Loop, depth: int) -> None:
        per_entry = loop.trips / loop.entries if loop.entries else 0
        unrolled: float | None = 1
        if loop.fixed and depth:
            unrolled = per_entry / code.trips if code.trips and loop.entries else None
            if unrolled and unrolled % 1:
                has = f"{loop.name} runs {per_entry:g} times, and its machine code {code.trips}"
                raise RuntimeError(f"{counted.name}: {has}")
        trips = loop.trips / (unrolled or 1) / programs
        inside = _without_unrolled(loop, len(code.inside))
        if len(code.inside) != len(inside):
            names = ", ".join(inner.name for inner in loop.inside) or "none"
            found = f"{len(code.inside)} in {loop.name}, which has: {names}"
            raise RuntimeError(f"{counted.name}: the machine code has other loops: {found}")
        shares: dict[str, float] = {}
        kinds = [work.get(loop.name, ("other", ""))[0]]
        kinds += [work.get(inner.name, ("", "other"))[1] for inner in inside]
        for kind, part in zip(kinds, code.parts, strict=True):
            shares["products"] = shares.get("products", 0) + part.products * trips
            shares[kind] = shares.get(kind, 0) + (part.instructions - part.products) * trips
        entries = loop.entries / programs if depth else 0
        shares[kinds[0]] += code.arm.instructions * entries
        instructions = sum(part.instructions for part in code.parts)
        barriers = sum(part.barriers for part in code.parts) * trips + code.arm.barriers * entries
        result.append(
            Row(
                loop.name,
                depth,
                trips,
                unrolled,
                instructions,
                barriers,
                sum(shares.values()),
                {kind: count for kind, count in shares.items() if count},
            )
        )
        for inner in zip(code.inside, inside, strict=True):
            add(*inner, depth + 1)

    add(code, counted, 0)
    return result
