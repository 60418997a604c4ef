"""Skipped steps: a step whose loss or gradient is not finite, or stands out, changes only its
number.

The compiled program selects, element by element, the old or the new state, so a NaN goes nowhere. A
GPU would wait for the predicate of a `lax.cond`.

Spikes follow the rule of OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core). A
step is a spike if its loss or its gradient norm exceeds the mean of the last 128 steps by more than
`train.spike_sigma` standard deviations. The first 64 steps are never spikes. Finite values of
skipped steps enter the window too, so that a lasting change of level is normal after a while.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sngpt_jax.config import TrainConfig

WINDOW = 128  # steps that a spike is compared with
_FEWEST = WINDOW // 2  # steps in the window before any step can be a spike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RecentSteps:
    """The measurements of the last W = 128 finite steps, in a ring."""

    count: jax.Array  # int32 scalar: values written so far
    loss_W: jax.Array  # float32, nats per token
    grad_norm_W: jax.Array  # float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skips:
    """The skipped steps so far: a part of the training state if the recipe skips any."""

    total: jax.Array  # int32 scalar
    in_a_row: jax.Array  # int32 scalar: up to the last step; 0 if that step was not skipped
    window: RecentSteps | None = None  # None: spikes are not skipped


def init_skips(config: TrainConfig) -> Skips | None:
    """The state before the first step; None if the configuration skips nothing."""
    if config.nonfinite != "skip" and not config.spike_sigma:
        return None
    zero, empty = jnp.zeros((), jnp.int32), jnp.zeros(WINDOW, jnp.float32)
    window = RecentSteps(zero, empty, empty) if config.spike_sigma else None
    return Skips(total=zero, in_a_row=zero, window=window)


def judge(
    config: TrainConfig, skips: Skips, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Skips]:
    """Whether to skip a step with these float32 scalars, and `skips` after it."""
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    skip = ~finite if config.nonfinite == "skip" else jnp.zeros((), bool)
    window = skips.window
    if window is not None:
        for value, values_W in ((loss, window.loss_W), (grad_norm, window.grad_norm_W)):
            skip |= finite & _stands_out(value, values_W, window.count, config.spike_sigma)
        place = window.count % WINDOW
        written = RecentSteps(
            window.count + 1,
            window.loss_W.at[place].set(loss),
            window.grad_norm_W.at[place].set(grad_norm),
        )
        window = select(finite, written, window)
    counted = jnp.asarray(skip, jnp.int32)
    return skip, Skips(skips.total + counted, (skips.in_a_row + 1) * counted, window)


def _stands_out(value: jax.Array, values_W: jax.Array, count: jax.Array, sigma: float) -> jax.Array:
    """Whether `value` exceeds the mean by more than `sigma` standard deviations (n - 1)."""
    n = jnp.minimum(count, WINDOW)
    held_W = jnp.arange(WINDOW) < n
    mean = jnp.sum(values_W, where=held_W) / jnp.maximum(n, 1)
    variance = jnp.sum(jnp.square(values_W - mean), where=held_W) / jnp.maximum(n - 1, 1)
    return (n >= _FEWEST) & (value - mean > sigma * jnp.sqrt(variance))


def select(take: jax.Array, tree: Any, otherwise: Any) -> Any:
    """`tree` if the boolean scalar `take` is true, else `otherwise`, of equal structure; exact."""
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), tree, otherwise)
