"""Options that several commands share: one description, one way of writing them in `--help`."""

from pathlib import Path
from typing import Annotated

import tyro

from sngpt_jax.config import Weights

_NO_DEFAULT = ""  # the description says what holds where the option is left out

Json = Annotated[
    str,
    tyro.conf.arg(
        metavar="[PATH]", help="print one JSON object, or write it to PATH", help_behavior_hint=""
    ),
]
Quiet = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(help="only warnings, errors and the result", help_behavior_hint=""),
]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
WeightsOption = Annotated[
    Weights | None,
    tyro.conf.arg(
        metavar="{final,swa,ema}",
        help="of the last step, or an average; default: what the run's eval.weights says",
        help_behavior_hint="",
    ),
]
