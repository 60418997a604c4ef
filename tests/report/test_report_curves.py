"""Curves made short, and groups of runs: against definitions written out."""

import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.report import grouping
from sngpt_jax.report.curves import running_mean, smooth, thin
from sngpt_jax.report.reading import Series, read_run
from tests import fake_run

VALUES = st.lists(
    st.floats(-1e6, 1e6) | st.just(float("nan")) | st.just(float("inf")), min_size=1, max_size=300
)


@given(VALUES, st.integers(10, 60))
def test_a_thinned_curve_keeps_ends_extremes_and_gaps(values, limit):
    y = np.array(values)
    kept = thin(y, limit)
    assert len(kept) == len(y) if len(y) <= limit else len(kept) <= limit
    assert (np.diff(kept) > 0).all()
    assert (kept[0], kept[-1]) == (0, len(y) - 1)
    finite, kept_finite = y[np.isfinite(y)], y[kept][np.isfinite(y[kept])]
    if len(finite):
        assert (kept_finite.min(), kept_finite.max()) == (finite.min(), finite.max())
    assert np.isfinite(y).all() == np.isfinite(y[kept]).all()


def test_spikes_and_gaps_of_one_step_are_kept_wherever_they_are():
    y = np.random.default_rng(0).normal(size=20_000)
    high, low = np.arange(50, 20_000, 400), np.arange(250, 20_000, 400)
    y[high], y[low], y[503], y[777] = 10, -10, np.nan, np.inf
    assert {*high, *low, 503, 777} <= set(thin(y, 600))


@given(VALUES, st.integers(0, 20).map(lambda half: 2 * half + 1))
def test_a_running_mean_is_the_mean_of_what_is_around(values, window):
    y = np.array(values)
    got = running_mean(y, window)
    for i in range(len(y)):
        around = y[max(i - window // 2, 0) : i + window // 2 + 1]
        around = around[np.isfinite(around)]
        expected = around.mean() if len(around) else np.nan
        np.testing.assert_allclose(got[i], expected, rtol=1e-6, atol=1e-6)


def test_short_curves_are_not_smoothed():
    assert smooth(Series(np.arange(149.0), np.ones(149))) is None
    mean = smooth(Series(np.arange(1000.0), np.arange(1000.0)))
    # of 21 values, 11 at the end
    assert mean is not None and mean.values[500] == 500 and mean.values[0] == 5


def test_runs_that_differ_only_in_their_seed_are_a_group(tmp_path):
    run = read_run(fake_run.make(tmp_path / "run"))
    groups = ["a_seed1 a_seed2", "b", "x y", "b1 b2", "cc-1 cc-2 cc-3"]
    runs = [
        replace(run, name=name, config=run.config | {"model.d_model": width, "train.seed": seed})
        for width, names in enumerate(groups)
        for seed, name in enumerate(names.split())
    ]
    mixed = [*runs[1:], runs[0]]
    assert grouping.group(mixed) == [
        ("a", [0, 9]),
        ("b", [1]),
        ("x + 1", [2, 3]),
        ("b1 + 1", [4, 5]),
        ("cc", [6, 7, 8]),
    ]


def test_bands_are_the_statistics_of_each_step():
    steps = [np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 9]), np.array([0.0, 2, 3, 4])]
    values = [np.array([0.0, 1, 2, 7]), np.array([4.0, np.nan, 8, 1]), np.array([5.0, 6, 7, 10])]
    band = grouping.band([Series(x, y) for x, y in zip(steps, values, strict=True)])
    np.testing.assert_array_equal(band.steps, [2, 4])
    for i, column in enumerate([[1.0, 4, 6], [7.0, 8, 10]]):
        assert band.mean[i] == pytest.approx(statistics.fmean(column))
        assert band.sd[i] == pytest.approx(statistics.stdev(column))
    assert grouping.band([Series(steps[0], values[0])]) is None
    apart = [Series(np.array([step]), np.array([1.0])) for step in (1.0, 2.0)]
    assert grouping.band(apart) is None
