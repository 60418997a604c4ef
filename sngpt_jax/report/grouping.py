"""Runs that differ only in their seed: mean and spread of their scores and curves."""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sngpt_jax.report.reading import RunData, Series, number

SEED = "train.seed"


@dataclass(frozen=True)
class Statistic:
    """The mean of n numbers, and their standard deviation with n - 1 in the denominator (None if n
    is 1).
    """

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Band:
    """Mean and standard deviation (n - 1) of curves at the steps where all of them are finite;
    float64 [N].
    """

    steps: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


def group(runs: Sequence[RunData]) -> list[list[int]]:
    """The indices of runs that agree in every field but `train.seed`: groups in the order of their
    first runs.
    """
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        key = json.dumps(run.config | {SEED: None}, sort_keys=True)
        found.setdefault(key, []).append(i)
    return list(found.values())


def one_per_seed(runs: Sequence[RunData]) -> list[RunData]:
    """The first run of each seed: another run of one seed is no further sample."""
    found: dict[str, RunData] = {}
    for run in runs:
        found.setdefault(json.dumps(run.config.get(SEED)), run)
    return list(found.values())


def labels(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """A name for each group. A single run has its own name. Several runs have the common beginning
    of their names, unless another group has it too.
    """
    found = [_beginning([names[i] for i in members]) for members in groups]
    result = []
    for name, (first, *others) in zip(found, groups, strict=True):
        if not others:
            name = names[first]
        elif not name or found.count(name) > 1:
            name = f"{names[first]} + {len(others)}"
        result.append(name)
    return result


def _beginning(names: Sequence[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).removesuffix("seed").rstrip("-_. /")


def statistic(values: Iterable[object]) -> Statistic | None:
    """The statistic of the values that are finite numbers; None if there are none."""
    finite = np.array([found for found in map(number, values) if found == found])
    if not len(finite):
        return None
    with np.errstate(all="ignore"):  # numbers near the largest float
        sd = float(finite.std(ddof=1)) if len(finite) > 1 else None
        return Statistic(float(finite.mean()), sd, len(finite))


def band(curves: Sequence[Series]) -> Band | None:
    """The band of two or more curves; None if they have no step in common."""
    finite = []
    for curve in curves:
        ok = np.isfinite(curve.values)
        finite.append(Series(curve.steps[ok], curve.values[ok]))
    steps = finite[0].steps
    for curve in finite[1:]:
        steps = np.intersect1d(steps, curve.steps, assume_unique=True)
    if len(finite) < 2 or not len(steps):
        return None
    values = np.stack([curve.values[np.searchsorted(curve.steps, steps)] for curve in finite])
    return Band(steps, values.mean(axis=0), values.std(axis=0, ddof=1))
