"""Curves of many thousand points made short enough to draw."""

import numpy as np

from sngpt_jax.report.reading import Series


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices, ascending, of at most `limit` of `values` [N], N of them where N is no more;
    `limit` is at least 10.

    The first and the last are among them. The others are, of each of equally long stretches, the
    first, the last, the smallest and the largest, and the first that is not finite: a spike of one
    step stays as high as it was, a gap stays one.
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
            chosen += [
                int(np.argmin(np.where(finite, part, np.inf))),
                int(np.argmax(np.where(finite, part, -np.inf))),
            ]
        if not finite.all():
            chosen.append(int(np.argmin(finite)))
        kept.append(stretch[np.unique(chosen)])
    return np.concatenate(kept)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """For each of `values` [N] the mean of the finite ones of the `window` (odd) around it, fewer
    at the ends; NaN of none.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    centre, half = np.arange(len(values)), window // 2
    low, high = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def smooth(series: Series) -> Series | None:
    """The running mean over a fiftieth of the points; None where they are too few for that."""
    window = len(series.values) // 50
    return Series(series.steps, running_mean(series.values, window | 1)) if window >= 3 else None
