"""How the learning rates and Muon's momentum change over a run, and when averages and the exported
grid begin.

Before a step the host knows the number of finished steps and the training seconds that they took.
The multiplier of all learning rates follows from them; if adam_final_lr_fraction is set, Adam's
groups have one that ends there. It is the smaller of two lines:

  warmup     step / warmup_steps, at most 1
  warmdown   final + (1 - final) · left, with final = final_lr_fraction. `left` falls from 1 to 0:
             it is the share of the warmdown that is still ahead. With schedule = constant it is 1.

The share ahead, before it is cut to [0, 1], with total = steps or max_seconds and now = step or
elapsed seconds, as warmdown_clock says:

  warmdown_fraction   (total - now) / (warmdown_fraction · total)
  warmdown_steps      steps:       (steps - step) / warmdown_steps
                      wall_clock:  (max_seconds - elapsed) / (warmdown_steps · elapsed / step)

Before the first step has finished, one step counts as finished. The wall-clock form is that of the
public Parameter Golf training script (https://github.com/openai/parameter-golf). Both steps and
max_seconds end a run, but only the one that warmdown_clock names shapes the schedule.

The line of the warmdown alone decides when snapshots are averaged (SWA: below swa_below, after
every swa_every-th step) and when weights are put on the exported grid (QAT: below qat_below).
"""

from typing import NamedTuple

import numpy as np
import optax

from sngpt_jax.config import OptimConfig, TrainConfig


def _share_ahead(
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


class StepControls(NamedTuple):
    """The host's decisions for one step, traced, so that a decision compiles nothing again."""

    lr_multiplier: np.float32  # on the learning rates of Muon's groups
    adam_lr_multiplier: np.float32  # on the learning rates of Adam's groups
    swa: np.bool_  # whether the weights after the step are a snapshot for the mean (SWA)
    qat: np.bool_  # whether the step uses its weights on the exported grid


def step_controls(
    optim: OptimConfig, train: TrainConfig, step: int, elapsed_seconds: float
) -> StepControls:
    """The decisions for the step after `step` finished steps, which took `elapsed_seconds`."""
    ahead = _share_ahead(optim, train, step, elapsed_seconds)
    rise = min(step / optim.warmup_steps, 1.0) if optim.warmup_steps else 1.0
    final, adam_final = optim.final_lr_fraction, optim.adam_final_lr_fraction
    warmdown = final + (1.0 - final) * ahead
    adam_warmdown = warmdown if adam_final is None else adam_final + (1.0 - adam_final) * ahead
    takes_snapshots = optim.swa_every > 0 and warmdown < optim.swa_below
    return StepControls(
        lr_multiplier=np.float32(min(rise, warmdown)),
        adam_lr_multiplier=np.float32(min(rise, adam_warmdown)),
        swa=np.bool_(takes_snapshots and (step + 1) % optim.swa_every == 0),
        qat=np.bool_(warmdown < optim.qat_below),  # false if qat_below is 0
    )


def muon_momentum(optim: OptimConfig) -> optax.Schedule:
    """Muon's momentum as a traceable function of the updates taken."""
    if not optim.muon_momentum_warmup_steps:
        return optax.constant_schedule(optim.muon_momentum)
    return optax.linear_schedule(
        optim.muon_momentum_start, optim.muon_momentum, optim.muon_momentum_warmup_steps
    )
