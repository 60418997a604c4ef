"""The definition of the operation and of its gradients in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
FLOOR = 1e-24  # of |v|²


def _dot(a: Array, b: Array) -> Array:
    return np.sum(a * b, axis=-1, keepdims=True)


def _parts(y: Array, v: ArrayLike | None, gate: tuple[ArrayLike, ArrayLike] | None) -> list[Array]:
    """v per head, max(|v|², floor), ⟨y, v⟩ / that, and the gate [B, T, H, 1]."""
    wide = np.zeros_like(y) if v is None else np.asarray(v, np.float64)
    wide = np.repeat(wide, y.shape[2] // wide.shape[2], axis=2)
    square = np.maximum(_dot(wide, wide), FLOOR)
    logits = 0 if gate is None else sum(np.asarray(part, np.float64) for part in gate)
    factor = np.ones((*y.shape[:3], 1)) if gate is None else 1 / (1 + np.exp(-logits))[..., None]
    return [wide, square, _dot(y, wide) / square, factor]


def finish(
    y: ArrayLike, v: ArrayLike | None = None, gate: tuple[ArrayLike, ArrayLike] | None = None
) -> Array:
    """`api.finish`."""
    y = np.asarray(y, np.float64)
    wide, _, share, factor = _parts(y, v, gate)
    return (y - share * wide) * factor


def gradients(
    y: ArrayLike, v: ArrayLike | None, gate: tuple[ArrayLike, ArrayLike] | None, dout: ArrayLike
) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
    """The gradients of ⟨finish(y, v, gate), dout⟩, in the arguments' structure."""
    y, dout = np.asarray(y, np.float64), np.asarray(dout, np.float64)
    wide, square, share, factor = _parts(y, v, gate)
    own = dout * factor
    along = _dot(own, wide) / square
    dwide = 2 * share * along * np.where(square > FLOOR, wide, 0) - along * y - share * own
    dv = None if v is None else dwide.reshape(*np.shape(v)[:3], -1, y.shape[3]).sum(axis=3)
    dlogits = (_dot(dout, y - share * wide) * factor * (1 - factor))[..., 0]
    dgate = None if gate is None else (dlogits, dlogits.sum(axis=(0, 1)))
    return own - along * wide, dv, dgate
