"""The definition in float64 numpy, one head at a time, with the gradients written out.

Shapes are those of `api.attention`: q and the cotangent [B, T, H, h], k and v [B, T, K, h].
"""

import numpy as np
from numpy.typing import ArrayLike

NORM_FLOOR = 1e-12  # If |v| is below it, v̂ is v / NORM_FLOOR.


def _weights(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """The causal softmax of one head: q and k [B, T, h] → [B, T, T]."""
    scores = scale * q @ k.swapaxes(1, 2)
    scores[:, ~np.tri(q.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=-1, keepdims=True)


def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, exclusive: bool, scale: float
) -> np.ndarray:
    """The output [B, T, H, h] of `api.attention`."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.empty_like(q)
    for head in range(q.shape[2]):
        own = v[:, :, head // group]
        y = _weights(q[:, :, head], k[:, :, head // group], scale) @ own
        if exclusive:
            unit = own / np.maximum(np.linalg.norm(own, axis=-1, keepdims=True), NORM_FLOOR)
            y -= _dot(y, unit) * unit
        out[:, :, head] = y
    return out


def gradients(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cotangent: ArrayLike, *, exclusive: bool, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients of ⟨cotangent, attention(q, k, v)⟩ by q, k and v."""
    q, k, v, cotangent = (np.asarray(array, np.float64) for array in (q, k, v, cotangent))
    group = q.shape[2] // k.shape[2]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head in range(q.shape[2]):
        shared = head // group
        own, dy = v[:, :, shared], cotangent[:, :, head]
        weights = _weights(q[:, :, head], k[:, :, shared], scale)
        if exclusive:  # out = y - ⟨y, u⟩ u with u = own / max(|own|, floor)
            y, norm = weights @ own, np.linalg.norm(own, axis=-1, keepdims=True)
            unit = own / np.maximum(norm, NORM_FLOOR)
            dunit = -_dot(dy, unit) * y - _dot(y, unit) * dy
            dunit -= np.where(norm > NORM_FLOOR, _dot(dunit, unit), 0) * unit
            dv[:, :, shared] += dunit / np.maximum(norm, NORM_FLOOR)
            dy = dy - _dot(dy, unit) * unit
        dv[:, :, shared] += weights.swapaxes(1, 2) @ dy
        dweights = dy @ own.swapaxes(1, 2)
        dscores = scale * weights * (dweights - _dot(weights, dweights))
        dq[:, :, head] = dscores @ k[:, :, shared]
        dk[:, :, shared] += dscores.swapaxes(1, 2) @ q[:, :, head]
    return dq, dk, dv
