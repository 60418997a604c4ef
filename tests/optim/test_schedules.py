"""Schedules: worked examples, and what holds for every run. tests/published has the scripts'."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.config import OptimConfig, TrainConfig
from sngpt_jax.config.recipe import load
from sngpt_jax.optim.schedules import muon_momentum, step_controls


def multiplier(*now):
    return float(step_controls(*now).lr_multiplier)


def near(expected):
    """Equal in float32."""
    return pytest.approx(expected, rel=2e-7, abs=1e-9)


def wall_clock(**changes):
    return OptimConfig(warmdown_clock="wall_clock", **changes)


CAP = TrainConfig(steps=20_000, max_seconds=600.0)


@pytest.mark.parametrize(
    ("step", "elapsed", "expected"),
    [
        (0, 0.0, 1.0),  # before anything has been timed
        (5000, 250.0, 1.0),  # 50 ms a step: the last 1200 steps take 60 s, 350 s are left
        (10_800, 540.0, 1.0),  # exactly 60 s left
        (11_400, 570.0, 0.5),
        (11_880, 594.0, 0.1),
        (12_000, 600.0, 0.0),
        (12_010, 600.5, 0.0),  # past the cap
        (0, 3.0, 597 / 3600),  # the first step is not finished: 3 s stand for it
    ],
)
def test_wall_clock_by_steps(step, elapsed, expected):
    assert multiplier(wall_clock(warmdown_steps=1200), CAP, step, elapsed) == near(expected)


@pytest.mark.parametrize(
    ("elapsed", "expected"),
    [(0.0, 1.0), (300.0, 1.0), (400.0, 200 / 300), (450.0, 0.5), (600.0, 0.0), (700.0, 0.0)],
)
@pytest.mark.parametrize("step", [0, 7, 19_999])
def test_wall_clock_by_fraction_ignores_the_steps(step, elapsed, expected):
    assert multiplier(wall_clock(warmdown_fraction=0.5), CAP, step, elapsed) == near(expected)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 1.0), (800, 1.0), (850, 0.75), (900, 0.5), (999, 0.005), (1000, 0.0)]
)
@pytest.mark.parametrize("length", [{"warmdown_steps": 200}, {"warmdown_fraction": 0.2}])
def test_steps(step, expected, length):
    train = TrainConfig(steps=1000, max_seconds=600.0)  # the cap ends the run and shapes nothing
    assert multiplier(OptimConfig(**length), train, step, 599.0) == near(expected)


def test_floor_and_warmup():
    optim = OptimConfig(warmup_steps=10, warmdown_steps=100, final_lr_fraction=0.1)
    train = TrainConfig(steps=1000)
    expected = {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 900: 1.0, 950: 0.55, 1000: 0.1}
    assert {step: multiplier(optim, train, step, 0.0) for step in expected} == near(expected)


def test_constant():
    optim = OptimConfig(schedule="constant", warmup_steps=4)
    values = [multiplier(optim, CAP, step, 0.0) for step in (0, 1, 4, 20_000)]
    assert values == [0.0, 0.25, 1.0, 1.0]


@st.composite
def runs(draw):
    """A valid pair of configurations, any clock and length."""
    steps = draw(st.integers(1, 5000))
    optim = OptimConfig(
        warmup_steps=draw(st.integers(0, 50)),
        warmdown_clock=draw(st.sampled_from(["steps", "wall_clock"])),
        final_lr_fraction=draw(st.floats(0, 1)),
    )
    if draw(st.booleans()):
        optim = dataclasses.replace(optim, warmdown_steps=draw(st.integers(1, steps)))
    else:
        optim = dataclasses.replace(optim, warmdown_fraction=draw(st.floats(0.001, 1)))
    return optim, TrainConfig(steps=steps, max_seconds=draw(st.floats(0.1, 1e5)))


@given(run=runs(), step=st.integers(0, 10_000), elapsed=st.floats(0, 1e6))
def test_bounds(run, step, elapsed):
    optim, train = run
    value = multiplier(optim, train, step, elapsed)
    assert 0.0 <= value <= 1.0
    if step >= optim.warmup_steps:
        assert value >= np.float32(optim.final_lr_fraction)


@given(run=runs(), seconds_a_step=st.floats(1e-3, 10))
def test_rises_then_falls_to_the_floor_without_jumps(run, seconds_a_step):
    """At an even pace, sampled in 200 parts of the run."""
    optim, train = run
    by_steps = optim.warmdown_clock == "steps"
    last = train.steps if by_steps else train.max_seconds / seconds_a_step
    # only a finished step tells how long warmdown_steps last
    first = 0 if by_steps or optim.warmdown_fraction else 1
    steps = sorted({max(int(last * part / 200), first) for part in range(201)})
    values = np.array([multiplier(optim, train, step, step * seconds_a_step) for step in steps])
    peak = int(values.argmax())
    assert (np.diff(values[: peak + 1]) >= -1e-12).all() and (np.diff(values[peak:]) <= 1e-12).all()

    end = multiplier(optim, train, int(last) if by_steps else int(last) + 1, train.max_seconds)
    if int(last) >= optim.warmup_steps:
        assert end == np.float32(optim.final_lr_fraction)
    warmdown = optim.warmdown_steps or optim.warmdown_fraction * last
    steepest = 1 / warmdown + (1 / optim.warmup_steps if optim.warmup_steps else 0)
    assert (np.abs(np.diff(values)) <= np.diff(steps) * steepest * (1 + 1e-9) + 1e-7).all()


@given(elapsed=st.floats(1.0, 599.0), step=st.integers(100, 20_000))
def test_is_continuous_in_the_clock(elapsed, step):
    optim = wall_clock(warmdown_steps=3000)
    here, next_to_it = (multiplier(optim, CAP, step, elapsed + e) for e in (0.0, 1e-6))
    assert 0.0 <= here - next_to_it < 1e-3 * max(1.0, step / elapsed / 3000)


# ------------------------------------------------------------ snapshots and the grid


def test_controls_by_steps():
    optim = OptimConfig(
        warmdown_steps=100, swa_every=10, swa_below=0.5, qat_below=0.25, final_lr_fraction=0.1
    )
    train = TrainConfig(steps=1000)
    fractions = {step: 0.1 + 0.9 * (1000 - step) / 100 for step in range(900, 1000)}
    for step in range(1000):
        controls, fraction = step_controls(optim, train, step, 0.0), fractions.get(step, 1.0)
        assert controls.lr_multiplier == np.float32(fraction)
        assert controls.swa == (fraction < 0.5 and (step + 1) % 10 == 0)
        assert controls.qat == (fraction < 0.25)


def test_controls_are_numpy_scalars():
    controls = step_controls(wall_clock(warmdown_steps=1200, swa_every=50), CAP, 11_400, 570.0)
    assert [type(value) for value in controls] == [np.float32, np.float32, np.bool_, np.bool_]


def test_a_warmup_is_no_warmdown():
    """The low learning rate of the start averages and quantizes nothing."""
    optim = OptimConfig(
        warmup_steps=500, warmdown_steps=100, swa_every=1, swa_below=1.0, qat_below=1.0
    )
    for step in range(1000):
        controls = step_controls(optim, TrainConfig(steps=1000), step, 0.0)
        assert controls.swa == controls.qat == (step > 900)


@given(run=runs(), step=st.integers(0, 10_000), elapsed=st.floats(0, 1e6))
def test_nothing_is_averaged_or_quantized_unless_asked(run, step, elapsed):
    rate, *others = step_controls(*run, step, elapsed)
    assert others == [rate, False, False]


def test_the_rates_of_the_sparse_models():
    """Linear from 0 over 200 steps, flat to step 1272, then linear to the end; one line for both
    rules, or two.
    """
    small, large = load("cayley_small_3l"), load("cayley_large_2l")

    def rates(config, step):
        muon, adam, _, _ = step_controls(config.optim, config.train, step, 0.0)
        o = config.optim
        return [muon * o.muon_lr, adam * o.embed_lr, adam * o.scalar_lr]

    last, middle = small.train.steps, (1271.6 + 12_716) / 2
    for step, expected in ((0, 0.0), (100, 6e-3), (200, 1.2e-2), (1271, 1.2e-2), (last, 1.5e-4)):
        np.testing.assert_allclose(rates(small, step), [expected] * 3, rtol=1e-6)
    np.testing.assert_allclose(rates(small, round(middle)), [(1.2e-2 + 1.5e-4) / 2] * 3, rtol=1e-4)
    for step, muon, adam in (
        (100, 4e-3, 1.5e-4),
        (6358, 8e-3, 3e-4),
        (9537, 4.05e-3, 1.55e-4),
        (last, 1e-4, 1e-5),
    ):
        np.testing.assert_allclose(rates(large, step), [muon, adam, adam], rtol=1e-6)


def test_momentum():
    optim = OptimConfig(
        muon_momentum_start=0.85, muon_momentum=0.95, muon_momentum_warmup_steps=500
    )
    schedule = jax.jit(muon_momentum(optim))
    values = [float(schedule(np.int32(count))) for count in (0, 1, 250, 500, 10_000)]
    np.testing.assert_allclose(values, [0.85, 0.8502, 0.9, 0.95, 0.95], atol=1e-6)
    assert muon_momentum(dataclasses.replace(optim, muon_momentum_warmup_steps=0))(0) == 0.95
