"""How the learning rates and Muon's momentum change over a run, and when averages and the exported
grid come in.

`step_controls` and its `lr_multiplier` are pure functions of what the host knows before a step:
the number of steps finished and the training seconds spent on them. All groups' learning rates are
multiplied by `lr_multiplier`, Adam's by one that ends at adam_final_lr_fraction where that is
given. It is the smaller of two lines, so a warmdown that begins early cuts a warmup short:

  warmup     step / warmup_steps: 0 at step 0, 1 from step warmup_steps on.
  warmdown   final + (1 - final) * left, where final = final_lr_fraction and left, between 1 and 0, is the share of the
             warmdown still ahead. With schedule = constant, left is 1.

The share ahead, each before it is cut to [0, 1]:

  warmdown_clock   warmdown_steps                              warmdown_fraction
  steps            (steps - step) / warmdown_steps             (steps - step) / (warmdown_fraction * steps)
  wall_clock       (max_seconds - elapsed)                     (max_seconds - elapsed) / (warmdown_fraction * max_seconds)
                     / (warmdown_steps * elapsed / step)

`steps` and `max_seconds` are `TrainConfig`'s, and either ends a run. Only the one that
warmdown_clock names shapes the schedule: a run that the other ends first ends before its warmdown
does. elapsed / step is the mean time of a step so far; before the first step has finished it
counts as finished, and before any time has passed left is 1. The wall-clock form is that of the
public Parameter Golf training script (https://github.com/openai/parameter-golf). The last step
begins one step before the end: its multiplier is just above final.

The warmdown's line, and not the warmup's, also decides from when on snapshots are averaged (SWA:
below swa_below, at every step whose number, counted from 1, swa_every divides) and weights are put
on the exported grid (QAT: below qat_below).
"""

from typing import NamedTuple

import numpy as np
import optax

from sngpt_jax.config import OptimConfig, TrainConfig


def _share_of_warmdown_left(
    optim: OptimConfig, train: TrainConfig, step: int, elapsed_seconds: float
) -> float:
    if optim.schedule == "constant":
        return 1.0
    if optim.warmdown_clock == "steps":
        total, now, length = float(train.steps), float(step), float(optim.warmdown_steps)
    else:
        total, now = train.max_seconds, elapsed_seconds
        length = optim.warmdown_steps * elapsed_seconds / max(step, 1)
    if optim.warmdown_fraction:
        length = optim.warmdown_fraction * total
    left = max(total - now, 0.0)
    return left / length if left < length else 1.0


def _warmdown(
    optim: OptimConfig,
    train: TrainConfig,
    step: int,
    elapsed_seconds: float,
    final: float | None = None,
) -> float:
    final = optim.final_lr_fraction if final is None else final
    return final + (1.0 - final) * _share_of_warmdown_left(optim, train, step, elapsed_seconds)


def lr_multiplier(
    optim: OptimConfig,
    train: TrainConfig,
    step: int,
    elapsed_seconds: float,
    final: float | None = None,
) -> float:
    """The factor in [0, 1] on the learning rates of the step after `step` finished ones that took
    `elapsed_seconds`.

    `final` is where the warmdown ends; None: at `final_lr_fraction`.
    """
    rise = min(step / optim.warmup_steps, 1.0) if optim.warmup_steps else 1.0
    return min(rise, _warmdown(optim, train, step, elapsed_seconds, final))


class StepControls(NamedTuple):
    """What the host decides for one step. The step takes it traced, so that a decision compiles
    nothing anew.
    """

    lr_multiplier: np.float32  # on the learning rates of Muon's groups
    adam_lr_multiplier: np.float32  # on those of Adam's
    swa: np.bool_  # whether the weights after the step are a snapshot of the mean (SWA)
    qat: np.bool_  # whether the step sees its weights on the exported grid


def step_controls(
    optim: OptimConfig, train: TrainConfig, step: int, elapsed_seconds: float
) -> StepControls:
    """The decisions for the step after `step` finished ones that took `elapsed_seconds`."""
    below = _warmdown(optim, train, step, elapsed_seconds)
    return StepControls(
        lr_multiplier=np.float32(lr_multiplier(optim, train, step, elapsed_seconds)),
        adam_lr_multiplier=np.float32(
            lr_multiplier(optim, train, step, elapsed_seconds, optim.adam_final_lr_fraction)
        ),
        swa=np.bool_(
            optim.swa_every > 0 and (step + 1) % optim.swa_every == 0 and below < optim.swa_below
        ),
        qat=np.bool_(below < optim.qat_below),  # never below 0
    )


def muon_momentum(optim: OptimConfig) -> optax.Schedule:
    """Muon's momentum as a traceable function of the updates taken: linear from its start value,
    then constant.
    """
    if not optim.muon_momentum_warmup_steps:
        return optax.constant_schedule(optim.muon_momentum)
    return optax.linear_schedule(
        optim.muon_momentum_start, optim.muon_momentum, optim.muon_momentum_warmup_steps
    )
