"""The residual stream, and the steps that change it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sngpt_jax.model.layers import per_channel, rms_norm


@dataclass(frozen=True)
class Stream:
    """x [B, T, D]. Each step is computed at once and rounded to the dtype of x.

    `LazyStream` has the same steps.
    """

    array: jax.Array

    def scaled(self, weights_D: jax.Array) -> Any:
        """Each channel times its weight."""
        return Stream(per_channel(weights_D, self.array))

    def shifted(self, bias_D: jax.Array) -> Any:
        """Each channel plus its bias."""
        shifted = self.array.astype(jnp.float32) + bias_D[None, None]
        return Stream(shifted.astype(self.array.dtype))

    def __add__(self, other: Any) -> Any:
        """The sum with another stream or an array [B, T, D]."""
        return Stream(self.array + (other.array if isinstance(other, Stream) else other))

    def used_twice(self) -> Any:
        """The same stream, if two sums read it."""
        return self

    def replaced(self, x_BTD: jax.Array) -> Any:
        """The stream x."""
        return Stream(x_BTD)

    def normed(
        self, eps: float, *, scale: float = 1.0, gain_D: jax.Array | None = None, uses: int = 1
    ) -> tuple[Any, ...]:
        """The stream, and gain ⊙ rms_norm(stream, eps, scale) [B, T, D] once for each of its
        `uses`.
        """
        n_BTD = rms_norm(self.array, eps, scale)
        n_BTD = n_BTD if gain_D is None else per_channel(gain_D, n_BTD)
        return self, *(n_BTD,) * uses
