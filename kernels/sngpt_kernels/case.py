"""A named real shape of an operation: what inspection, benchmark and tuning have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Cost:
    """What one call must do at least."""

    matmul_flops: int  # on tensor cores: two a multiply-add, in the arguments' dtype
    bytes: int  # read from and written to the device's memory


@dataclass(frozen=True)
class Case:
    """One shape of one operation; its implementations take the same arguments."""

    name: str  # of a recipe, or of what is special: golf_11l_xsa4
    make: Callable[[jax.Array], tuple[jax.Array, ...]]  # fresh random arguments from a key
    # run(*arguments, implementation=NAME), the output that has a gradient
    run: Callable[..., jax.Array]
    differentiated: tuple[int, ...]  # which arguments have a gradient
    # run in float64 numpy, for the error beside each time; may be slow
    reference: Callable[..., Any]
    implementations: tuple[str, ...]
    forward: Cost
    backward: Cost

    def abstract(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arguments' shapes and dtypes."""
        return jax.eval_shape(self.make, jax.random.key(0))
