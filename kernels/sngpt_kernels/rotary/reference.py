"""The definition of the operation and of its gradients in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (j, j + r/2) of the leading r dimensions; the other dimensions stay."""
    half = cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    c, s = cos[:, :, None], sin[:, :, None]
    return np.concatenate([x1 * c + x2 * s, x2 * c - x1 * s, x[..., 2 * half :]], axis=-1)


def _gains(x: Array, gain: ArrayLike) -> Array:
    """[N, 1]: the queries' gains, and 1 for each key head."""
    given = np.asarray(gain, np.float64)
    return np.concatenate([given, np.ones(x.shape[2] - len(given))])[:, None]


def prepare(
    x: ArrayLike, gain: ArrayLike, cos: ArrayLike, sin: ArrayLike, *, eps: float, values: int = 0
) -> Array:
    """`api.prepare`, with the heads of queries, keys and values side by side: [B, T, …, h]."""
    x, cos, sin = (np.asarray(a, np.float64) for a in (x, cos, sin))
    if values:
        both = prepare(x[:, :, :-values], gain, cos, sin, eps=eps)
        return np.concatenate([both, x[:, :, -values:]], axis=2)
    norm = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return _turn(x / norm, cos, sin) * _gains(x, gain)


def gradients(
    x: ArrayLike, gain: ArrayLike, cos: ArrayLike, sin: ArrayLike, dy: ArrayLike, *, eps: float
) -> tuple[Array, Array]:
    """The gradients of ⟨prepare(…), dy⟩ with respect to x and to the gain."""
    x, cos, sin, dy = (np.asarray(a, np.float64) for a in (x, cos, sin, dy))
    norm = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    unit, scale = x / norm, _gains(x, gain)
    dgain = np.sum(_turn(unit, cos, sin) * dy, axis=(0, 1, 3))[: len(np.asarray(gain))]
    dunit = _turn(dy * scale, cos, -sin)  # the inverse of a rotation is its transpose
    return (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True)) / norm, dgain
