"""The story of a run: `python -m sngpt_jax.train --config configs/quickstart.py`.

    recipe → data → state (new, or the last checkpoint) → compile → steps, validation, checkpoints → summary

The loop sends step N to the device and then reads the metrics of step N-1, so the device never waits for the host.
Training time, which a wall-clock schedule follows, leaves out compilation, validation and checkpoints.
"""

import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sngpt_jax import cli, run_directory
from sngpt_jax.checkpoint import Checkpointer
from sngpt_jax.cli import EXIT_NON_FINITE, EXIT_SIGINT, EXIT_SIGTERM, UserError
from sngpt_jax.config import Config, Overrides, microbatches, parse_command, profile_window, recipe_name
from sngpt_jax.data.loader import GlobalBatches, make_loader
from sngpt_jax.data.shards import Dataset, open_dataset
from sngpt_jax.evaluation.bpb import Score, score_stream
from sngpt_jax.metrics import Console, MetricsWriter, StepMeter, peak_flops
from sngpt_jax.optim.groups import describe, format_table
from sngpt_jax.optim.schedules import lr_multiplier
from sngpt_jax.parallel import batch_placer, make_mesh
from sngpt_jax.plan import abstract_params, make_plan
from sngpt_jax.sample import generate
from sngpt_jax.step import Metrics, TrainState, abstract_state, all_finite, init_state, make_eval_step, make_train_step


@dataclass(frozen=True)
class TrainArguments:
    config: str  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    run_dir: str = ""  # where the run is kept, and resumed from; default: runs/NAME


class NonFinite(Exception):
    """A loss, gradient or parameter stopped being a finite number at `step`."""

    def __init__(self, step: int, what: str):
        super().__init__(f"{what} is not finite at step {step}")


def main(argv: Sequence[str]) -> int:
    arguments = parse_command(
        TrainArguments,
        argv,
        program="python -m sngpt_jax.train",
        description="Trains the model of a recipe. The same command again resumes from the last checkpoint.",
    )
    config = arguments.overrides
    run_dir = Path(arguments.run_dir or Path("runs") / recipe_name(arguments.config))
    resume = shlex.join(["python", "-m", "sngpt_jax.train", *argv])
    cli.log_to_stderr()
    with run_directory.claim(run_dir, config):
        return Run(config, run_dir, resume).train()
