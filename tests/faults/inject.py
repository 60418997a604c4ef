"""Runs a module as `python -m` does, in a process to which something is done first.

    python -m tests.faults.inject [--nan STEP,STEP] [--clock SEED] sngpt_jax.train --config …

--nan: the gradients of these steps are NaN, their losses finite.
--clock: the wall clock jumps by up to a day, back and forth.
"""

import random
import runpy
import sys
import time

MARK = 3  # a token that no text here has: the byte 0


def make_nan(steps: list[int]) -> None:
    """Marks the batches of these steps. The loss's gradient is NaN where it meets the mark."""
    import jax.numpy as jnp

    from sngpt_jax.data.loader import GlobalBatches
    from sngpt_jax.training import step

    original, mean_loss = GlobalBatches.__getitem__, step.loss.mean_loss

    def marked(self, index):
        batch = original(self, index)
        if int(index) + 1 in steps:
            batch["targets"] = batch["targets"].copy()
            batch["targets"][0, 0] = MARK
        return batch

    def poisoned(x_BTD, table_VD, targets_BT, **settings):
        # its slope at 0 is infinite
        root = jnp.sqrt(jnp.where(targets_BT[0, 0] == MARK, 0.0 * x_BTD[0, 0, 0], 1.0))
        return mean_loss(x_BTD, table_VD, targets_BT, **settings) + 0.0 * root

    GlobalBatches.__getitem__ = marked
    step.loss.mean_loss = poisoned


def make_clock_jump(seed: int) -> None:
    """The clock that people set, `time.time`, jumps at about every hundredth look at it."""
    rng, real, jump = random.Random(seed), time.time, [0.0]

    def jumping() -> float:
        if rng.random() < 0.01:
            jump[0] = rng.uniform(-86_400, 86_400)
        return real() + jump[0]

    time.time = jumping


def main() -> None:
    arguments = sys.argv[1:]
    while arguments[0].startswith("--"):
        name, value, *arguments = arguments
        if name == "--nan":
            make_nan([int(step) for step in value.split(",")])
        else:
            make_clock_jump(int(value))
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
