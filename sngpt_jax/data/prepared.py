"""The data that a recipe names: opened, and prepared first where that can be done without a
network.
"""

import contextlib
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from sngpt_jax.base import cli
from sngpt_jax.base.errors import EXIT_SIGINT, EXIT_SIGTERM, UserError
from sngpt_jax.config import Config
from sngpt_jax.data.manifest import MANIFEST
from sngpt_jax.data.shards import Dataset, open_dataset, unfinished
from sngpt_jax.data.spec import COMMAND, PrepareSpec, command_line, differing

logger = logging.getLogger("sngpt_jax")

_GRACE = 5.0  # seconds that a preparation gets to end by itself after Ctrl-C


def spec_of(config: Config) -> PrepareSpec:
    """What the recipe has prepared, and where to."""
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
    """The recipe's data; prepared first where that has not been done (or not finished) and its
    source is on this machine.

    Raises `UserError` where the source is on the network, where the preparation was killed, and
    where the folder holds data that were prepared with other settings than the recipe's;
    `SystemExit` where the preparation failed or was told to stop.
    """
    d, directory, spec = config.data, Path(config.data.dir), spec_of(config)
    if d.source and not _ready(directory):
        if d.source.startswith(("hub:", "golf")):
            raise UserError(
                f"data.dir: {directory.absolute()} has no whole data, and its source is on the"
                f" network; run: {cli.command(COMMAND, *command_line(spec))}, or say where the data"
                " are with --data.dir DIR"
            )
        _prepare(spec)
    data = open_dataset(directory, config.model.vocab_size)
    if data.manifest and d.source:
        other, machine = differing(spec, data.manifest)
        if other:
            raise UserError(
                f"{directory}: prepared otherwise than the recipe says ({'; '.join(other)}); choose"
                " another --data.dir, or set the recipe's data and model.vocab_size to what is"
                " there"
            )
        if machine:
            logger.warning(
                "%s: taken as it is, though it cannot be made again here (%s)",
                directory,
                "; ".join(machine),
            )
    return data


def _ready(directory: Path) -> bool:
    """Whether a folder holds whole data: a preparation's, or shards of others that nothing is
    being fetched into.
    """
    return (directory / MANIFEST).is_file() or (
        any(directory.glob("*.bin")) and not unfinished(directory)
    )


def _prepare(spec: PrepareSpec) -> None:
    """Prepares in a process of its own, without jax, whose workers start fast; it ends before this
    function does.

    SIGTERM is handed on to it and ends this process too, quietly; so does Ctrl-C, which reaches
    both.
    """
    process: subprocess.Popen[bytes] | None = None
    terminated = False

    def terminate(number: int, frame: Any) -> None:
        nonlocal terminated
        terminated = True
        if process:
            process.terminate()

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        quiet = [] if logger.isEnabledFor(logging.INFO) else ["--quiet"]
        # no panel, no next command
        command = [sys.executable, "-m", COMMAND, *command_line(spec), "--json", *quiet]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        if terminated:  # while it was being started
            process.terminate()
        status = process.wait()
    except KeyboardInterrupt:
        if process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        raise SystemExit(EXIT_SIGINT) from None
    finally:
        if process:
            process.terminate()  # nothing where it has ended
            process.wait()
        signal.signal(signal.SIGTERM, before)
    if terminated:
        raise SystemExit(EXIT_SIGTERM)
    if status < 0:
        raise UserError(
            f"the preparation of {spec.out} was killed by {signal.Signals(-status).name}; to go on"
            f" where it was: {cli.command(COMMAND, *command_line(spec))}"
        )
    if status:
        raise SystemExit(status)
