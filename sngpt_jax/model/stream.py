"""The residual stream, a weighted sum that is computed where an RMSNorm follows."""

from dataclasses import dataclass, replace
from typing import Self

import jax
from sngpt_kernels.stream import api
from sngpt_kernels.stream.api import Implementation

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.layers import chosen_by, per_channel, rms_norm


@dataclass(frozen=True)
class Stream:
    """Σ wᵢ ⊙ Σ xᵢⱼ of groups of arrays [B, T, D] and their weights [D]; no weight is 1.

    Each pass over the stream costs as much memory traffic as a small product. So a kernel computes
    the sum and its norm together, and until then `scaled` and `+` only note what to add. Without
    the kernel each step is computed at once, and there is one group of one array.
    """

    groups: tuple[tuple[jax.Array | None, tuple[jax.Array, ...]], ...]
    named: Implementation | None  # by the recipe
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
        ((_, (x_BTD,)),) = self.groups
        return x_BTD

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
            return replace(self, groups=self.groups + other.groups)
        if not self.by_kernel:
            return self._now(self.array + other)
        *before, (weight, arrays) = self.groups
        if weight is None:  # arrays of one group share a gradient
            return replace(self, groups=(*before, (None, (*arrays, other))))
        return replace(self, groups=(*self.groups, (None, (other,))))

    def normed(
        self, eps: float, *, scale: float = 1.0, gain_D: jax.Array | None = None
    ) -> tuple[Self, jax.Array]:
        """The stream, computed, and gain ⊙ rms_norm(stream, eps, scale) [B, T, D]."""
        if self.by_kernel:
            weights, arrays = zip(*self.groups, strict=True)
            u_BTD, n_BTD = api.sum_norm(
                arrays, weights, gain_D, eps=eps, scale=scale, implementation=self.named
            )
            return self._now(u_BTD), n_BTD
        n_BTD = rms_norm(self.array, eps, scale)
        return self, n_BTD if gain_D is None else per_channel(gain_D, n_BTD)
