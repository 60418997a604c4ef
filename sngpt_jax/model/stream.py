"""The residual stream, a weighted sum that is computed where an RMSNorm follows."""

from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from sngpt_kernels.stream import api

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.layers import chosen_by, per_channel, rms_norm


@dataclass(eq=False)
class Shared:
    """A sum that several kernels read. The first of them also writes it, for the others."""

    arrays: tuple[jax.Array, ...]
    again: bool = True  # whether a kernel after the next one reads it too


@dataclass(frozen=True)
class Stream:
    """Σ wᵢ ⊙ Σ xᵢⱼ of groups of arrays [B, T, D] and their weights [D]; no weight is 1.

    Each pass over the stream costs as much memory traffic as a small product. So a kernel computes
    the sum and its norm together, and until then `scaled` and `+` only note what to add. Without
    the kernel each step is computed at once, and there is one group of one array.
    """

    groups: tuple[tuple[jax.Array | None, tuple[jax.Array, ...] | Shared], ...]
    named: Any  # the implementation in the recipe, or None
    by_kernel: bool

    @classmethod
    def of(cls, x_BTD: jax.Array, config: ModelConfig) -> Self:
        """The stream that is x. The device decides how its sums are computed."""
        named = None if config.stream == "auto" else config.stream
        with chosen_by("stream"):
            chosen = api.choose(x_BTD.dtype, x_BTD.shape[-1], named)
        return cls(((None, (x_BTD,)),), named, chosen != "xla")

    def _now(self, x_BTD: jax.Array) -> Self:
        return replace(self, groups=((None, (x_BTD,)),))

    @property
    def array(self) -> jax.Array:
        """The stream [B, T, D] that has been computed."""
        ((_, (x_BTD,)),) = self.groups  # type: ignore[misc]  # only a kernel reads shared sums
        return x_BTD

    def used_twice(self) -> Self:
        """The same stream, for two sums; each would otherwise compute it."""
        if not self.by_kernel:
            return self
        ((weight, arrays),) = self.groups
        assert isinstance(arrays, tuple)
        return replace(self, groups=((weight, Shared(arrays)),))

    def scaled(self, weights_D: jax.Array) -> Self:
        """Each channel times its weight."""
        if not self.by_kernel:
            return self._now(per_channel(weights_D, self.array))
        weighted = ((weights_D if w is None else w * weights_D, xs) for w, xs in self.groups)
        return replace(self, groups=tuple(weighted))

    def shifted(self, bias_D: jax.Array) -> Self:
        """Each channel plus its bias."""
        if not self.by_kernel:
            return self._now(self.array + bias_D.astype(self.array.dtype)[None, None])
        return replace(self, groups=(*self.groups, (bias_D, ())))

    def __add__(self, other: "Stream | jax.Array") -> Self:
        if isinstance(other, Stream):
            if not self.by_kernel:
                return self._now(self.array + other.array)
            (weight, sums), *more = other.groups
            (own, same), *mine = self.groups
            if sums is same:  # one kernel reads it, for both
                if isinstance(sums, Shared):
                    sums.again = False
                both = jnp.add(1.0 if own is None else own, 1.0 if weight is None else weight)
                return replace(self, groups=((both, sums), *mine, *more))
            return replace(self, groups=self.groups + other.groups)
        if not self.by_kernel:
            return self._now(self.array + other)
        *before, (weight, arrays) = self.groups
        if weight is None and isinstance(arrays, tuple):  # arrays of one group share a gradient
            return replace(self, groups=(*before, (None, (*arrays, other))))
        return replace(self, groups=(*self.groups, (None, (other,))))

    def normed(
        self, eps: float, *, scale: float = 1.0, gain_D: jax.Array | None = None, uses: int = 1
    ) -> tuple[Any, ...]:
        """The stream, computed, and gain ⊙ rms_norm(stream, eps, scale) [B, T, D].

        The kernel adds the gradients of the norm's `uses`, of which each takes its own copy.
        """
        if not self.by_kernel:
            n_BTD = rms_norm(self.array, eps, scale)
            n_BTD = n_BTD if gain_D is None else per_channel(gain_D, n_BTD)
            return self, *(n_BTD,) * uses
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
        return self._now(u_BTD), *results
