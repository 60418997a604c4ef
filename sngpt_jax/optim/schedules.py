"""How the learning rates and Muon's momentum change over a run.

`lr_multiplier` is a pure function of what the host knows before a step: the number of steps finished and the training seconds
spent on them. All groups' learning rates are multiplied by it. It is the smaller of two lines, so a warmdown that begins
early cuts a warmup short:

  warmup     step / warmup_steps: 0 at step 0, 1 from step warmup_steps on.
  warmdown   final + (1 - final) * left, where final = final_lr_fraction and left, between 1 and 0, is the share of the
             warmdown still ahead. With schedule = constant, left is 1.

The share ahead, each before it is cut to [0, 1]:

  warmdown_clock   warmdown_steps                              warmdown_fraction
  steps            (steps - step) / warmdown_steps             (steps - step) / (warmdown_fraction * steps)
  wall_clock       (max_seconds - elapsed)                     (max_seconds - elapsed) / (warmdown_fraction * max_seconds)
                     / (warmdown_steps * elapsed / step)

`steps` and `max_seconds` are `TrainConfig`'s, and either ends a run. Only the one that warmdown_clock names shapes the
schedule: a run that the other ends first ends before its warmdown does. elapsed / step is the mean time of a step so far;
before the first step has finished it counts as finished, and before any time has passed left is 1. The wall-clock form is
that of the public Parameter Golf training script (https://github.com/openai/parameter-golf). The last step begins one step
before the end: its multiplier is just above final.
"""

import optax

from sngpt_jax.config import OptimConfig, TrainConfig


def _share_of_warmdown_left(optim: OptimConfig, train: TrainConfig, step: int, elapsed_seconds: float) -> float:
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


def lr_multiplier(optim: OptimConfig, train: TrainConfig, step: int, elapsed_seconds: float) -> float:
    """The factor in [0, 1] on every learning rate of the step after `step` finished ones that took `elapsed_seconds`."""
    rise = min(step / optim.warmup_steps, 1.0) if optim.warmup_steps else 1.0
    final = optim.final_lr_fraction
    return min(rise, final + (1.0 - final) * _share_of_warmdown_left(optim, train, step, elapsed_seconds))


def muon_momentum(optim: OptimConfig) -> optax.Schedule:
    """Muon's momentum as a traceable function of the updates taken: linear from its start value, then constant."""
    if not optim.muon_momentum_warmup_steps:
        return optax.constant_schedule(optim.muon_momentum)
    return optax.linear_schedule(optim.muon_momentum_start, optim.muon_momentum, optim.muon_momentum_warmup_steps)
