"""The definition of the operation and of its gradients in numpy float64."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _sum(arrays: Sequence[Sequence[ArrayLike]], weights: Sequence[ArrayLike | None]) -> Array:
    total: Array = np.zeros(())
    for group, weight in zip(arrays, weights, strict=True):
        inner = sum((np.asarray(x, np.float64) for x in group), np.zeros(())) if group else 1.0
        total = total + (1.0 if weight is None else np.asarray(weight, np.float64)) * inner
    return total


def sum_norm(
    arrays: Sequence[Sequence[ArrayLike]],
    weights: Sequence[ArrayLike | None],
    gain: ArrayLike | None = None,
    *,
    eps: float,
    scale: float = 1.0,
) -> tuple[Array, Array]:
    """`api.sum_norm`."""
    u = _sum(arrays, weights)
    norm = np.sqrt(np.mean(u**2, axis=-1, keepdims=True) + eps)
    return u, scale * (1.0 if gain is None else np.asarray(gain, np.float64)) * u / norm


def gradients(
    arrays: Sequence[Sequence[ArrayLike]],
    weights: Sequence[ArrayLike | None],
    gain: ArrayLike | None,
    du: ArrayLike,
    dn: ArrayLike,
    *,
    eps: float,
    scale: float = 1.0,
) -> tuple[list[list[Array]], list[Array | None], Array | None]:
    """The gradients of ⟨u, du⟩ + ⟨n, dn⟩ with respect to arrays, weights and gain."""
    u, du, dn = (np.asarray(a, np.float64) for a in (_sum(arrays, weights), du, dn))
    norm = np.sqrt(np.mean(u**2, axis=-1, keepdims=True) + eps)
    unit, axes = u / norm, tuple(range(u.ndim - 1))
    dunit = scale * dn * (1.0 if gain is None else np.asarray(gain, np.float64))
    g = du + (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True)) / norm
    darrays, dweights = [], []
    for group, weight in zip(arrays, weights, strict=True):
        factor = 1.0 if weight is None else np.asarray(weight, np.float64)
        darrays.append([g * factor for _ in group])
        inner = sum((np.asarray(x, np.float64) for x in group), np.zeros(())) if group else 1.0
        dweights.append(None if weight is None else np.sum(g * inner, axis=axes))
    return darrays, dweights, None if gain is None else np.sum(scale * dn * unit, axis=axes)
