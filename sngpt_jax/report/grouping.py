"""Runs that differ only in their seed: the mean and the spread of their scores and of their
curves.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sngpt_jax.report.reading import RunData, Series, number

SEED = "train.seed"


@dataclass(frozen=True)
class Statistic:
    """Of n numbers the mean, and the standard deviation with n - 1 in the denominator, None of
    fewer than two.
    """

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Band:
    """Mean and standard deviation (n - 1) of curves at the steps that all of them have a finite
    value at; float64 [N].
    """

    steps: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


def group(runs: Sequence[RunData]) -> list[list[int]]:
    """The places of runs that agree in every field but `train.seed`, group by group, in the order
    of their first ones.
    """
    found: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        key = json.dumps(
            {name: value for name, value in run.config.items() if name != SEED}, sort_keys=True
        )
        found.setdefault(key, []).append(place)
    return list(found.values())


def one_a_seed(runs: Sequence[RunData]) -> list[RunData]:
    """The first run of each seed: another one of the same seed is no further sample."""
    return list({json.dumps(run.config.get(SEED)): run for run in reversed(runs)}.values())[::-1]


def labels(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[str]:
    """A name for each group: of one run its own; of several what theirs begin with alike, where no
    other has that name.
    """
    found = [
        _beginning([names[i] for i in members]) if len(members) > 1 else names[members[0]]
        for members in groups
    ]
    return [
        (
            name
            if len(members) == 1 or (name and found.count(name) == 1)
            else f"{names[members[0]]} + {len(members) - 1}"
        )
        for name, members in zip(found, groups, strict=True)
    ]


def _beginning(names: Sequence[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).removesuffix("seed").rstrip("-_. /")


def statistic(values: Iterable[object]) -> Statistic | None:
    """Of those values that are finite numbers; None where there are none."""
    finite = np.array([found for found in map(number, values) if found == found])
    if not len(finite):
        return None
    with np.errstate(all="ignore"):  # of numbers near the largest float
        return Statistic(
            float(finite.mean()),
            float(finite.std(ddof=1)) if len(finite) > 1 else None,
            len(finite),
        )


def band(curves: Sequence[Series]) -> Band | None:
    """The band of two curves or more; None where they have no step in common."""
    finite = [
        Series(curve.steps[ok], curve.values[ok])
        for curve in curves
        for ok in [np.isfinite(curve.values)]
    ]
    steps = finite[0].steps
    for curve in finite[1:]:
        steps = np.intersect1d(steps, curve.steps, assume_unique=True)
    if len(finite) < 2 or not len(steps):
        return None
    values = np.stack([curve.values[np.searchsorted(curve.steps, steps)] for curve in finite])
    return Band(steps, values.mean(axis=0), values.std(axis=0, ddof=1))
