"""Options that several commands share, so that `--help` describes each of them alike."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sngpt_jax.config import PathText, Weights

_arg = partial(tyro.conf.arg, help_behavior_hint="")

Json = Annotated[
    PathText, _arg(metavar="[PATH]", help="print one JSON object, or write it to PATH")
]
Quiet = Annotated[
    bool, tyro.conf.FlagCreatePairsOff, _arg(help="show only warnings, errors and the result")
]
OptionalPath = Annotated[Path | None, _arg(metavar="PATH")]
OptionalInt = Annotated[int | None, _arg(metavar="INT")]
WeightsOption = Annotated[
    Weights | None,
    _arg(
        metavar="{final,swa,ema}",
        help="weights of the last step, or an average; default: the run's eval.weights",
    ),
]
# a field's `--eval.device-batch-tokens`
EvalTokensOption = Annotated[
    int | None,
    _arg(
        name="eval.device-batch-tokens",
        metavar="INT",
        help="most tokens that one device scores at a time; default: the run's",
    ),
]
KernelsOption = Annotated[
    Literal["check", "trust", "off"],
    _arg(help="custom kernels: compare each with XLA before its first use, use all, or use none"),
]
