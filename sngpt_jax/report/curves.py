"""Long curves made short enough to draw."""

import numpy as np

from sngpt_jax.report.reading import Series


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """The ascending indices of at most `limit` (at least 10) of `values` [N]; all if N ≤ `limit`.

    Equally long stretches each keep their first, last, smallest and largest value, and the first
    that is not finite. So a spike of one step keeps its height, and a gap stays a gap.
    """
    n = len(values)
    if n <= limit:
        return np.arange(n)
    kept = []
    for stretch in np.array_split(np.arange(n), limit // 5):
        part = values[stretch]
        finite = np.isfinite(part)
        chosen = [0, len(part) - 1]
        if finite.any():
            known = np.where(finite, part, np.nan)
            chosen += [int(np.nanargmin(known)), int(np.nanargmax(known))]
        if not finite.all():
            chosen.append(int(np.argmin(finite)))
        kept.append(stretch[np.unique(chosen)])
    return np.concatenate(kept)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values among the `window` (odd) around each of `values` [N].

    There are fewer at the ends. The mean of none is NaN.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre, half = np.arange(len(values)), window // 2
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def smooth(series: Series) -> Series | None:
    """The running mean over a fiftieth of the points; None if there are too few."""
    window = len(series.values) // 50
    return Series(series.steps, running_mean(series.values, window | 1)) if window >= 3 else None
