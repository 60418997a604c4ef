"""The data that a recipe names: opened, and prepared first if that needs no network."""

import logging
import signal
import sys
from pathlib import Path

from sngpt_jax.base import cli
from sngpt_jax.base.errors import EXIT_SIGTERM, UserError
from sngpt_jax.config import Config
from sngpt_jax.data.encode import usable_cpus
from sngpt_jax.data.manifest import MANIFEST
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import Dataset, open_dataset, unfinished
from sngpt_jax.data.spec import COMMAND, PrepareSpec, command_line, differing

logger = logging.getLogger("sngpt_jax")


def spec_of(config: Config) -> PrepareSpec:
    """What the recipe has prepared."""
    d = config.data
    return PrepareSpec(
        source=d.source,
        out=d.dir,
        tokenizer=d.tokenizer,
        val_source=d.val_source,
        val_docs=d.val_docs,
        max_tokens=d.max_tokens,
        vocab_size=config.model.vocab_size,
        normalization=d.normalization,
    )


def prepared_data(config: Config) -> Dataset:
    """The recipe's data, prepared first if they are not complete and their source is here.

    SIGTERM ends a preparation with `SystemExit`. Raises `UserError` if the source is on the network
    or unusable, or if the folder was prepared with other settings than the recipe's.
    """
    d, directory, spec = config.data, Path(config.data.dir), spec_of(config)
    if d.source and not _ready(directory):
        if d.source.startswith(("hub:", "golf")):
            run = cli.command(COMMAND, *command_line(spec))
            raise UserError(
                f"data.dir: {directory.absolute()} has no whole data, and its source is on the"
                f" network; run: {run}, or say where the data are with --data.dir DIR"
            )
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))
        try:
            prepare(spec, usable_cpus())
        finally:
            signal.signal(signal.SIGTERM, before)
    data = open_dataset(directory, config.model.vocab_size)
    if data.manifest and d.source:
        other, machine = differing(spec, data.manifest)
        if other:
            raise UserError(
                f"{directory}: prepared with other settings than the recipe's ({'; '.join(other)});"
                " choose another --data.dir, or change the recipe's data and model.vocab_size"
            )
        if machine:
            again = "used as it is, though this machine cannot make it again"
            logger.warning(f"{directory}: {again} ({'; '.join(machine)})")
    return data


def _ready(directory: Path) -> bool:
    """Whether a folder holds a finished preparation, or shards that are not being downloaded."""
    return (directory / MANIFEST).is_file() or (
        any(directory.glob("*.bin")) and not unfinished(directory)
    )
