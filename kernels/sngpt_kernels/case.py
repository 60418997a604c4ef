"""A named real shape of an operation, for the inspection, the benchmark and the tuning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass(frozen=True)
class Cost:
    """The least work of one call."""

    matmul_flops: int  # on tensor cores: two per multiply-add, in the arguments' dtype
    bytes: int  # read from and written to the device's memory


UNCOUNTED = Cost(0, 0)


@dataclass(frozen=True)
class Case:
    """One shape of one operation. All its implementations take the same arguments."""

    name: str  # of a recipe, or of what is special about the shape: golf_11l_xsa4
    make: Callable[[jax.Array], tuple[jax.Array, ...]]  # fresh random arguments from a key
    # run(*arguments, implementation=NAME) returns the output that has a gradient
    run: Callable[..., jax.Array]
    differentiated: tuple[int, ...]  # the positions of the arguments that have a gradient
    reference: Callable[..., Any]  # `run` in float64 numpy; may be slow
    implementations: tuple[str, ...]
    forward: Cost
    backward: Cost
    # largest share of the output's rows that may differ, because a choice met a tie
    ties: float = 0.0
    # runs the kernels in interpretation, on arguments for which their loops run as often as usual
    interpret: Callable[[], Any] | None = None
    # by the name of a loop's body, or of a kernel: the kind of work of its code, and of the code
    # after the loop
    work: Mapping[str, tuple[str, str]] = field(default_factory=dict, hash=False)

    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The shapes and dtypes of the arguments."""
        return jax.eval_shape(self.make, jax.random.key(0))
