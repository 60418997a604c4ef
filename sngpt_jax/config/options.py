"""Options that several commands share, so that `--help` describes each of them alike."""

from pathlib import Path
from typing import Annotated

import tyro

from sngpt_jax.config import Weights

Json = Annotated[
    str,
    tyro.conf.arg(
        metavar="[PATH]", help="print one JSON object, or write it to PATH", help_behavior_hint=""
    ),
]
Quiet = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="show only warnings, errors and the result", help_behavior_hint=""),
]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
WeightsOption = Annotated[
    Weights | None,
    tyro.conf.arg(
        metavar="{final,swa,ema}",
        help="weights of the last step, or an average; default: the run's eval.weights",
        help_behavior_hint="",
    ),
]
