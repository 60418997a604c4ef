"""Runs that differ only in their seed: their names, and the mean and spread of their curves."""

import functools
import itertools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sngpt_jax.report.reading import RunData, Series

SEED = "train.seed"


class Group(NamedTuple):
    """Runs that agree in every field but `train.seed`."""

    name: str
    runs: list[int]  # their indices


class Band(NamedTuple):
    """Mean and standard deviation (n - 1) of curves at their common `steps`; float64 [N]."""

    steps: np.ndarray
    mean: np.ndarray
    sd: np.ndarray


def group(runs: Sequence[RunData]) -> list[Group]:
    """The groups in the order of their first runs.

    A single run has its own name. Several runs have the common beginning of their names, unless
    another group has it too.
    """
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        key = json.dumps(run.config | {SEED: None}, sort_keys=True)
        found.setdefault(key, []).append(i)
    starts = [_beginning([runs[i].name for i in members]) for members in found.values()]
    groups = []
    for name, members in zip(starts, found.values(), strict=True):
        first, others = runs[members[0]].name, len(members) - 1
        if not others:
            name = first
        elif not name or starts.count(name) > 1:
            name = f"{first} + {others}"
        groups.append(Group(name, members))
    return groups


def _beginning(names: Sequence[str]) -> str:
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).removesuffix("seed").rstrip("-_. /")


def one_per_seed(runs: Sequence[RunData]) -> list[RunData]:
    """The first run of each seed: another run of one seed is no further sample."""
    found: dict[int, RunData] = {}
    for run in runs:
        found.setdefault(run.config[SEED], run)
    return list(found.values())


def band(curves: Sequence[Series]) -> Band | None:
    """The band of two or more curves where all are finite; None without a common step."""
    finite = [curve.finite() for curve in curves]
    steps = functools.reduce(np.intersect1d, (curve.steps for curve in finite))
    if len(finite) < 2 or not len(steps):
        return None
    values = np.stack([curve.values[np.isin(curve.steps, steps)] for curve in finite])
    return Band(steps, values.mean(axis=0), values.std(axis=0, ddof=1))
