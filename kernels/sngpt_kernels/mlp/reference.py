"""The definition of the operation and of its gradients in numpy float64."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def residual_mlp(
    x: ArrayLike,
    y: ArrayLike,
    out: ArrayLike,
    up: ArrayLike,
    down: ArrayLike,
    activation: str,
    eps: float,
    scale: float,
) -> Array:
    """`api.residual_mlp`."""
    arrays = x, y, out, up, down
    x64, y64, out64, up64, down64 = (np.asarray(array, np.float64) for array in arrays)
    u = x64 + y64 @ out64
    norm = np.sqrt(np.mean(u**2, axis=-1, keepdims=True) + eps)
    h = scale * u / norm @ up64
    below = {"relu2": 0.0, "leaky_relu2": 0.25}[activation]
    return u + np.where(h > 0, 1.0, below) * h**2 @ down64
