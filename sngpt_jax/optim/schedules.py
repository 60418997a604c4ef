"""How the learning rates and Muon's momentum change over a run, and when averages and the exported
grid begin.

`step_controls` and `lr_multiplier` are pure functions of what the host knows before a step: the
number of finished steps and the training seconds that they took. `lr_multiplier` multiplies the
learning rates of all groups; if adam_final_lr_fraction is set, Adam's groups have a multiplier that
ends there. The multiplier is the smaller of two lines, so an early warmdown cuts a warmup short:

  warmup     step / warmup_steps, at most 1
  warmdown   final + (1 - final) · left, with final = final_lr_fraction. `left` falls from 1 to 0:
             it is the share of the warmdown that is still ahead. With schedule = constant it is 1.

The share ahead, before it is cut to [0, 1], with total = steps or max_seconds and now = step or
elapsed seconds, as warmdown_clock says:

  warmdown_fraction   (total - now) / (warmdown_fraction · total)
  warmdown_steps      steps:       (steps - step) / warmdown_steps
                      wall_clock:  (max_seconds - elapsed) / (warmdown_steps · elapsed / step)

elapsed / step is the mean time per step; before the first step has finished, one step counts as
finished. The wall-clock form is that of the public Parameter Golf training script
(https://github.com/openai/parameter-golf). Both steps and max_seconds end a run, but only the one
that warmdown_clock names shapes the schedule. The last step begins one step before the end, so its
multiplier is just above final.

The line of the warmdown alone decides when snapshots are averaged (SWA: below swa_below, after
every swa_every-th step) and when weights are put on the exported grid (QAT: below qat_below).
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
    """The factor in [0, 1] on the learning rates of the step after `step` finished steps, which
    took `elapsed_seconds`.

    The warmdown ends at `final`; None: at `final_lr_fraction`.
    """
    rise = min(step / optim.warmup_steps, 1.0) if optim.warmup_steps else 1.0
    return min(rise, _warmdown(optim, train, step, elapsed_seconds, final))


class StepControls(NamedTuple):
    """The host's decisions for one step. They are traced, so a decision compiles nothing again."""

    lr_multiplier: np.float32  # on the learning rates of Muon's groups
    adam_lr_multiplier: np.float32  # on the learning rates of Adam's groups
    swa: np.bool_  # whether the weights after the step are a snapshot for the mean (SWA)
    qat: np.bool_  # whether the step uses its weights on the exported grid


def step_controls(
    optim: OptimConfig, train: TrainConfig, step: int, elapsed_seconds: float
) -> StepControls:
    """The decisions for the step after `step` finished steps, which took `elapsed_seconds`."""
    now = optim, train, step, elapsed_seconds
    below = _warmdown(*now)
    snapshot = optim.swa_every > 0 and (step + 1) % optim.swa_every == 0 and below < optim.swa_below
    return StepControls(
        lr_multiplier=np.float32(lr_multiplier(*now)),
        adam_lr_multiplier=np.float32(lr_multiplier(*now, optim.adam_final_lr_fraction)),
        swa=np.bool_(snapshot),
        qat=np.bool_(below < optim.qat_below),  # false if qat_below is 0
    )


def muon_momentum(optim: OptimConfig) -> optax.Schedule:
    """Muon's momentum as a traceable function of the updates taken: a linear rise, then
    constant.
    """
    if not optim.muon_momentum_warmup_steps:
        return optax.constant_schedule(optim.muon_momentum)
    return optax.linear_schedule(
        optim.muon_momentum_start, optim.muon_momentum, optim.muon_momentum_warmup_steps
    )
