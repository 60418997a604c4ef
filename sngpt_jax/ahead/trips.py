"""How often the loops of kernels run: counted while they are interpreted on this machine.

The trips of most loops are known from the kernel's configuration. The others depend on the data,
such as a bisection's. A case runs on typical arguments, and every loop of its kernels counts.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from sngpt_kernels import dispatch
from sngpt_kernels.dispatch import Device


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
        traced = any(isinstance(end, jax.core.Tracer) for end in (low, high))
        loop = Loop(function.__name__, fixed=not traced)
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
