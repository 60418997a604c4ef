"""The definition of the operation in numpy float64: plain sets and sums, one token at a time.

The implementations share only atoms and child generators with it.
"""

from typing import NamedTuple

import numpy as np

from sngpt_kernels.cayley import dictionary
from sngpt_kernels.cayley.dictionary import STD_FLOOR, Generators, Levels


class Code(NamedTuple):
    """The code of N tokens of A = Σk features, by level, then descending y, then id."""

    x_hat: np.ndarray  # [N, d]
    ids: np.ndarray  # int64 [N, A]
    c: np.ndarray  # [N, A]: the coefficients


def scores(x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """⟨x, v_f⟩ for one x [d] and the features `ids` [n]: [n]."""
    # The division comes last, so that equal sums give equal scores.
    return dictionary.signs(ids, len(x)) @ np.asarray(x, np.float64) / np.sqrt(len(x))


def child_steps(levels: Levels, level: int, generators: Generators) -> set[int]:
    """The u with a new part. The children of a parent f are the f ⊕ u."""
    below, (n, _, degree) = levels[level - 1][0], levels[level]
    elements = {0}
    for b in dictionary.child_generators(below, n, degree, generators):
        elements |= {u ^ b for u in elements}
    return {u for u in elements if u >> below}


def encode_decode(
    x: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    bias: np.ndarray,
    levels: Levels,
    *,
    forward_standardized: bool = True,
    generators: Generators = "spread",
) -> Code:
    """The code of x [N, d] as `api.encode_decode` describes it; mean [d], std and bias [F]."""
    x, mean, std, bias = (np.asarray(a, np.float64) for a in (x, mean, std, bias))
    steps = [child_steps(levels, level, generators) for level in range(1, len(levels))]
    codes = []
    for centred in x - mean:
        chosen: list[tuple[float, int, float]] = []  # (-y, id, coefficient), of all levels
        selected = chosen  # of the level before
        candidates = set(range(2 ** levels[0][0]))
        for level, (_, k, _) in enumerate(levels):
            if level:
                candidates = {parent ^ u for _, parent, _ in selected for u in steps[level - 1]}
            f = np.array(list(candidates))
            z = scores(centred, f)
            y = z / np.maximum(std[f], STD_FLOOR) + bias[f]
            coefficients = np.maximum(y if forward_standardized else z + bias[f], 0)
            ranked = sorted(zip((-y).tolist(), f.tolist(), coefficients.tolist(), strict=True))
            selected = ranked[:k]
            chosen += selected
        codes.append(chosen)
    active = sum(k for _, k, _ in levels)
    _, ids, c = np.moveaxis(np.reshape(np.array(codes), (len(x), active, 3)), -1, 0)
    ids = ids.astype(np.int64)
    return Code(np.einsum("na,nad->nd", c, dictionary.atoms(ids, x.shape[-1])), ids, c)


def gradients(
    code: Code, std: np.ndarray, dx_hat: np.ndarray, *, forward_standardized: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(∂L/∂x [N, d], ∂L/∂bias [F]) for ∂L/∂x_hat [N, d], through the selected features alone."""
    v = dictionary.atoms(code.ids, dx_hat.shape[-1])
    g = np.einsum("nad,nd->na", v, np.asarray(dx_hat, np.float64)) * (code.c > 0)
    dbias = np.bincount(code.ids.ravel(), g.ravel(), len(std))
    if forward_standardized:
        g = g / np.maximum(np.asarray(std, np.float64)[code.ids], STD_FLOOR)
    return np.einsum("na,nad->nd", g, v), dbias


def update_statistics(
    mean: np.ndarray, std: np.ndarray, sample: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The running mean [d] and deviations of the scores [F] after a step with a sample [N, d]."""
    deviations = np.array([scores(x, np.arange(len(std))) for x in sample]).std(0)
    mean = 0.99 * mean + 0.01 * np.mean(sample, 0, np.float64)
    return mean, 0.99 * std + 0.01 * deviations
