"""The definition of the operation in numpy float64, one token at a time: what the implementations are tested against.

Slow on purpose: plain sets and sums. Only atoms and child generators are shared with the implementations.
"""

from typing import NamedTuple

import numpy as np

from kernels.cayley import dictionary
from kernels.cayley.dictionary import Generators, Levels

STD_FLOOR = 1e-3


class Code(NamedTuple):
    """The code of N tokens; A = Σk features each, level by level, within a level by descending y."""

    x_hat: np.ndarray  # [N, d]
    ids: np.ndarray  # int64 [N, A]
    c: np.ndarray  # [N, A]: the coefficients


def _child_set(parent: int, levels: Levels, level: int, generators: Generators) -> set[int]:
    below, (n, _, degree) = levels[level - 1][0], levels[level]
    elements = {0}
    for b in dictionary.child_generators(below, n, degree, generators):
        elements |= {u ^ b for u in elements}
    return {parent ^ u for u in elements if u >> below}


def _best(candidates: set[int], y: np.ndarray, k: int) -> list[int]:
    """The k candidates with the largest y, equal ones by the lower id."""
    return sorted(candidates, key=lambda f: (-y[f], f))[:k]


def all_scores(x: np.ndarray, n_last: int) -> np.ndarray:
    """⟨x, v_f⟩ for x [N, d] and every f < 2^n_last: [N, 2^n_last]."""
    d = x.shape[-1]
    blocks = [np.arange(start, start + d) for start in range(0, 2**n_last, d)]
    return np.concatenate([np.asarray(x, np.float64) @ dictionary.atoms(block, d).T for block in blocks], axis=1)


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
    """The code of x [N, d] as `kernels.cayley.encode_decode` describes it; `mean` [d], `std` and `bias` [2^n_last]."""
    x, mean, std, bias = (np.asarray(a, np.float64) for a in (x, mean, std, bias))
    scores = all_scores(x - mean, levels[-1][0])
    y = scores / np.maximum(std, STD_FLOOR) + bias
    ids = []
    for token in range(len(x)):
        selected = _best(set(range(2 ** levels[0][0])), y[token], levels[0][1])
        path = list(selected)
        for level in range(1, len(levels)):
            candidates = set().union(*(_child_set(f, levels, level, generators) for f in selected))
            selected = _best(candidates, y[token], levels[level][1])
            path += selected
        ids.append(path)
    ids = np.array(ids, np.int64).reshape(len(x), -1)
    forwarded = y if forward_standardized else scores + bias
    c = np.maximum(np.take_along_axis(forwarded, ids, axis=1), 0)
    return Code(np.einsum("na,nad->nd", c, dictionary.atoms(ids, x.shape[-1])), ids, c)


def gradients(
    code: Code, std: np.ndarray, dx_hat: np.ndarray, *, forward_standardized: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(∂L/∂x [N, d], ∂L/∂bias [2^n_last]) for ∂L/∂x_hat [N, d], through the selected features alone."""
    v = dictionary.atoms(code.ids, dx_hat.shape[-1])
    g = np.einsum("nad,nd->na", v, np.asarray(dx_hat, np.float64)) * (code.c > 0)
    dbias = np.zeros(len(std))
    np.add.at(dbias, code.ids, g)
    if forward_standardized:
        g = g / np.maximum(np.asarray(std, np.float64)[code.ids], STD_FLOOR)
    return np.einsum("na,nad->nd", g, v), dbias


def update_statistics(
    mean: np.ndarray, std: np.ndarray, sample: np.ndarray, decay: float = 0.99
) -> tuple[np.ndarray, np.ndarray]:
    """The running mean [d] and standard deviations of the scores [2^n_last] after a step whose sample is [N, d]."""
    sample = np.asarray(sample, np.float64)
    scores = all_scores(sample, int(np.log2(len(std))))
    return decay * mean + (1 - decay) * sample.mean(0), decay * std + (1 - decay) * scores.std(0)
