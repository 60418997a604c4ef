"""The data that a recipe names: opened, and prepared first where that can be done without a network."""

import contextlib
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from sngpt_jax.cli import UserError
from sngpt_jax.config import Config
from sngpt_jax.data.prepare import PrepareSpec, command_line, differing
from sngpt_jax.data.shards import Dataset, open_dataset

logger = logging.getLogger("sngpt_jax")


def prepared_data(config: Config) -> Dataset:
    """The recipe's data; prepared first where that has not been done (or not finished) and its source is on this machine."""
    d, directory = config.data, Path(config.data.dir)
    spec = PrepareSpec(
        source=d.source,
        out=d.dir,
        tokenizer=d.tokenizer,
        val_source=d.val_source,
        val_docs=d.val_docs,
        vocab_size=config.model.vocab_size,
        normalization=d.normalization,
    )
    ready = (directory / "manifest.json").exists() or (any(directory.glob("*.bin")) and not list(directory.glob("progress*")))
    if not ready and d.source:
        command = command_line(spec)
        if d.source.startswith(("hub:", "golf")):
            raise UserError(f"data.dir = {directory} has no data, and its source is on the network; run: {shlex.join(command)}")
        status = subprocess.run([sys.executable, *command[1:]]).returncode  # a process without jax: its workers start fast
        if status:
            raise SystemExit(status)
    data = open_dataset(directory, config.model.vocab_size)
    if data.manifest and d.source:
        with contextlib.suppress(UserError):  # the source need not be there any more
            if lines := differing(spec, data.manifest):
                logger.warning("%s: prepared otherwise than the recipe says (%s); taken as it is", directory, "; ".join(lines))
    return data
