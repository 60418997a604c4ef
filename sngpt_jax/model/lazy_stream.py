"""The residual stream as a weighted sum, which a kernel computes where an RMSNorm follows."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from sngpt_kernels.stream import api

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.layers import chosen_by
from sngpt_jax.model.stream import Stream


@dataclass(eq=False)
class Shared:
    """A sum that several kernels read. The first of them returns it, for the others."""

    arrays: tuple[jax.Array, ...]
    again: bool = True  # whether a kernel after the next one reads it too


@dataclass(frozen=True)
class LazyStream:
    """Σ wᵢ ⊙ Σ xᵢⱼ of groups of arrays [B, T, D] and their weights [D]; no weight is 1.

    Each pass over the stream costs as much memory traffic as a small product. So the steps of
    `Stream` only note what to add, and `normed` computes the sum and its norm in one pass.
    """

    groups: tuple[tuple[jax.Array | None, tuple[jax.Array, ...] | Shared], ...]
    named: api.Implementation | None  # by the recipe

    @property
    def array(self) -> jax.Array:
        """The stream [B, T, D], if it is one array."""
        ((_, arrays),) = self.groups
        assert isinstance(arrays, tuple)
        (x_BTD,) = arrays
        return x_BTD

    def replaced(self, x_BTD: jax.Array) -> "LazyStream":
        return replace(self, groups=((None, (x_BTD,)),))

    def used_twice(self) -> "LazyStream":
        ((weight, arrays),) = self.groups
        assert isinstance(arrays, tuple)
        return replace(self, groups=((weight, Shared(arrays)),))

    def scaled(self, weights_D: jax.Array) -> "LazyStream":
        weighted = ((weights_D if w is None else w * weights_D, xs) for w, xs in self.groups)
        return replace(self, groups=tuple(weighted))

    def shifted(self, bias_D: jax.Array) -> "LazyStream":
        return replace(self, groups=(*self.groups, (bias_D, ())))

    def __add__(self, other: "LazyStream | jax.Array") -> "LazyStream":
        if isinstance(other, LazyStream):
            (weight, sums), *more = other.groups
            (own, same), *mine = self.groups
            if sums is same:  # one kernel reads it, for both
                if isinstance(sums, Shared):
                    sums.again = False
                both = jnp.add(1.0 if own is None else own, 1.0 if weight is None else weight)
                return replace(self, groups=((both, sums), *mine, *more))
            return replace(self, groups=self.groups + other.groups)
        *before, (weight, arrays) = self.groups
        if weight is None and isinstance(arrays, tuple):  # arrays of one group share a gradient
            return replace(self, groups=(*before, (None, (*arrays, other))))
        return replace(self, groups=(*self.groups, (None, (other,))))

    def normed(
        self, eps: float, *, scale: float = 1.0, gain_D: jax.Array | None = None, uses: int = 1
    ) -> tuple[Any, ...]:
        """As `Stream.normed`. The kernel adds the gradients of the `uses`."""
        weights, sums = zip(*self.groups, strict=True)
        first = sums[0]
        write = isinstance(first, Shared) and first.again
        u_BTD, *results = api.sum_norm(
            [s.arrays if isinstance(s, Shared) else s for s in sums],
            *(weights, gain_D),
            eps=eps,
            scale=scale,
            uses=uses,
            first=write,
            implementation=self.named,
        )
        if write:
            first.arrays, first.again = (results.pop(),), False
        return self.replaced(u_BTD), *results


def start(x_BTD: jax.Array, config: ModelConfig) -> Any:
    """The stream that is x: a `LazyStream` where the device or the recipe chooses the kernel."""
    named = None if config.stream == "auto" else config.stream
    with chosen_by("stream"):
        chosen = api.choose(x_BTD.dtype, x_BTD.shape[-1], named)
    return Stream(x_BTD) if chosen == "xla" else LazyStream(((None, (x_BTD,)),), named)
