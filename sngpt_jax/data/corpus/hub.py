"""Hugging Face data sets, streamed."""

import importlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.corpus.reading import text_of
from sngpt_jax.data.manifest import explained

logger = logging.getLogger("sngpt_jax")

_HUB = re.compile(r"hub:(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>.+))?")

Hub = tuple[str, str | None, str]  # name, configuration and split of a data set


def imported(package: str, what: str) -> Any:
    """The module of an optional package that `what` needs. Raises `UserError` with the command
    that installs it.
    """
    # The hub's client would log every retry. The last failure is an exception anyway.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not logger.isEnabledFor(logging.INFO):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        return importlib.import_module(package)
    except ImportError:
        pip = shlex.join([sys.executable, "-m", "pip", "install", package])
        raise UserError(f"{what} needs the package {package}; install it: {pip}") from None


def hub_parts(source: str) -> Hub:
    """What `source` names. Raises `UserError`."""
    match = _HUB.fullmatch(source)
    if not match:
        raise UserError(f"source {source!r}: expected hub:NAME[:CONFIG][@SPLIT]")
    return match["name"], match["config"], match["split"] or "train"


def load_hub(name: str, config: str | None, split: str) -> Any:
    """The stream of a data set's rows."""
    datasets = imported("datasets", f"source hub:{name}")
    return datasets.load_dataset(name, config, split=split, streaming=True)


def hub_texts(source: str, hub: Hub, part: int, parts: int, text_key: str) -> Iterator[str]:
    """The column `text_key` of part `part` of `parts`. Raises `DataError`."""
    row = 0
    with explained(lambda: f"source {source}: the data set fails after row {row}"):
        data = load_hub(*hub)
        for values in data.shard(parts, part) if parts > 1 else data:  # a run of whole files
            row += 1
            yield text_of(values, text_key, f"{source}: row {row}")
