"""The options of the benchmarks, whose descriptions `--help` prints.

This module imports nothing that takes long.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sngpt_jax.ahead.cases import CaseArguments
from sngpt_jax.config import PathText
from sngpt_jax.config.options import (
    Json,
    KernelsOption,
    OptionalInt,
    OptionalPath,
    Quiet,
    WeightsOption,
)
from sngpt_jax.config.recipe import Overrides

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class RecipeArguments:
    config: PathText  # recipe: a file, the name of one in configs/, or a run's config.json
    overrides: Overrides
    json: Json = ""
    quiet: Quiet = False


@dataclass(frozen=True)
class StepArguments(RecipeArguments):
    """Times the training step of a recipe, alone or beside the same model in PyTorch.

    Other benchmarks: bench kernels | tune | compiled | export | policies |
    scoring | first-light | all.
    """

    # torch: also time the same model in PyTorch, eager and compiled, on one device
    against: Literal["none", "torch"] = "none"
    rounds: int = 9  # rounds in which all implementations take turns
    steps: int = 10  # steps per round of each implementation
    kernels: KernelsOption = "check"


@dataclass(frozen=True)
class CompiledArguments:
    """Compiles the training steps for GPUs and compares them with those of an older commit.

    No GPU is needed, but jax's CUDA plugin is.
    """

    recipes: tuple[str, ...] = ()  # names of recipes; none: all with older figures
    json: Json = ""


@dataclass(frozen=True)
class ExportArguments(RecipeArguments):
    """Times the export of a model with drawn weights and prints the size of its artifact."""

    sigma: float = 0.14  # standard deviation of the drawn matrices and tables
    repeats: int = 5  # rounds in which all parts take turns; medians are printed
    # also print the bytes of the same codes in the form of the submission's own script
    against_published: bool = False


@dataclass(frozen=True)
class ScoringArguments(RecipeArguments):
    """Times the scoring of a recipe's model, and the n-gram caches."""

    # stride of the sliding windows; default: 64, or a whole window if that is shorter
    stride: OptionalInt = None
    batches: int = 16  # batches of windows per timing
    repeats: int = 5  # rounds in which all timings take turns; medians are printed
    # targets from the training shards that each n-gram cache scores; 0 skips the caches
    cache_targets: int = 4_000_000


@dataclass(frozen=True)
class PoliciesArguments:
    """Exports one trained model by several policies and compares their bits, bytes and scores."""

    run: Path  # run directory of a trained model
    data: OptionalPath = None  # folder with prepared shards; default: the run's
    step: OptionalInt = None  # checkpoint; default: the latest
    weights: WeightsOption = None
    # weights up to which a tensor is not quantized, for all policies; the published size is for
    # models of width 512
    passthrough_size: int = 65_536
    gptq_tokens: int = 131_072  # training tokens for the second moments of GPTQ
    tokens: int = 0  # validation tokens to score, from the start of the stream; 0 scores all
    json: Json = ""
    quiet: Quiet = False


@dataclass(frozen=True)
class KernelsArguments(CaseArguments):
    """Times every implementation of every kernel operation, beside its error and the limit."""

    quick: Flag = False  # measure fewer rounds
    tune: Flag = False  # first try block sizes, and write tuned/<device>.json
    # also write the table for a document to this path
    markdown: Annotated[PathText, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = ""


@dataclass(frozen=True)
class TuneArguments(CaseArguments):
    """Finds the kernels' fastest block sizes on this device and writes tuned/<device>.json."""


@dataclass(frozen=True)
class AllArguments(RecipeArguments):
    """Runs every benchmark that this machine can run, one after the other."""

    run: OptionalPath = None  # run directory of a trained model, for the export policies


@dataclass(frozen=True)
class FirstLightArguments:
    """Shows in a few minutes what works on this GPU and how fast; see docs/first_light.md."""

    minutes: float = 8.0  # time for all parts, whose limits scale with it
    out: PathText = "first_light"  # folder for the results
    # cpu: tries the parts themselves, with tiny shapes
    device: Literal["gpu", "cpu"] = "gpu"
    data: PathText = ""  # prepared folder of a pack for the training run; default: prepared here
    # makes this folder with what a machine without a network needs, and measures nothing
    pack: PathText = ""
    python: str = "3.12"  # version of Python on that machine
    json: Json = ""
