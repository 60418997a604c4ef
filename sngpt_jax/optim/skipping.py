"""Steps that change nothing but their number, because their loss or gradient is no finite number
or stands out.

A step is judged inside of the compiled program by two scalars that all devices have: its loss and
the norm of its gradient. What a skipped step would have changed is selected away, element by
element, so a NaN in it goes nowhere; a `lax.cond` would have a GPU wait for its predicate.

Spikes: the rule of OLMo-core's SkipStepOptimizer (https://github.com/allenai/OLMo-core). A step is
one where its loss or its gradient norm exceeds the mean of the last 128 steps by more than
`train.spike_sigma` of their standard deviations; the first 64 steps are never one. Skipped values
count among the last 128 where they are finite, so a level that has changed for good is taken for
normal after a while.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from sngpt_jax.config import TrainConfig

WINDOW = 128  # steps that a spike is measured against
_FEWEST = WINDOW // 2  # of them, before any step is a spike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """What the last W = 128 finite steps measured, in a ring."""

    count: jax.Array  # int32 scalar: values written so far
    loss_W: jax.Array  # float32, nats a token
    grad_norm_W: jax.Array  # float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skips:
    """What has been skipped so far; part of the training state where anything can be."""

    total: jax.Array  # int32 scalar
    in_a_row: jax.Array  # int32 scalar: up to and including the last step; 0 where that one counted
    window: Window | None = None  # where spikes are skipped


def init_skips(config: TrainConfig) -> Skips | None:
    """Nothing skipped yet; None where the configuration skips nothing."""
    if config.nonfinite != "skip" and not config.spike_sigma:
        return None
    zero, empty = jnp.zeros((), jnp.int32), jnp.zeros(WINDOW, jnp.float32)
    window = Window(zero, empty, empty) if config.spike_sigma else None
    return Skips(total=zero, in_a_row=zero, window=window)


def judge(
    config: TrainConfig, skips: Skips, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Skips]:
    """Whether a step of this `loss` and `grad_norm`, float32 scalars, is to be skipped, and
    `skips` after it.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    skip = ~finite if config.nonfinite == "skip" else jnp.zeros((), bool)
    window = skips.window
    if window is not None:
        for value, values_W in ((loss, window.loss_W), (grad_norm, window.grad_norm_W)):
            skip |= finite & _stands_out(value, values_W, window.count, config.spike_sigma)
        window = select(finite, _written(window, loss, grad_norm), window)
    counted = jnp.asarray(skip, jnp.int32)
    return skip, Skips(
        total=skips.total + counted, in_a_row=(skips.in_a_row + 1) * counted, window=window
    )


def _stands_out(value: jax.Array, values_W: jax.Array, count: jax.Array, sigma: float) -> jax.Array:
    """Whether `value` exceeds the mean of the `count` values, at most W, by more than `sigma`
    standard deviations (n - 1).
    """
    n = jnp.minimum(count, WINDOW)
    held_W = jnp.arange(WINDOW) < n
    mean = jnp.sum(values_W, where=held_W) / jnp.maximum(n, 1)
    variance = jnp.sum(jnp.square(values_W - mean), where=held_W) / jnp.maximum(n - 1, 1)
    return (n >= _FEWEST) & (value - mean > sigma * jnp.sqrt(variance))


def _written(window: Window, loss: jax.Array, grad_norm: jax.Array) -> Window:
    place = window.count % WINDOW
    return replace(
        window,
        count=window.count + 1,
        loss_W=window.loss_W.at[place].set(loss),
        grad_norm_W=window.grad_norm_W.at[place].set(grad_norm),
    )


def select(take: jax.Array, tree: Any, otherwise: Any) -> Any:
    """`tree` where the boolean scalar `take` is true, else `otherwise`, of the same structure; to
    the last bit.
    """
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), tree, otherwise)
