"""The data that a recipe names: opened, and prepared first if that needs no network."""

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

_GRACE = 5.0  # seconds in which a preparation may end by itself after Ctrl-C


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
    """The recipe's data, prepared first if they are not complete and their source is here.

    Raises `UserError` if the source is on the network, if the preparation was killed, or if the
    folder was prepared with other settings than the recipe's; `SystemExit` if the preparation
    failed or was told to stop.
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
                f"{directory}: prepared with other settings than the recipe's ({'; '.join(other)});"
                " choose another --data.dir, or set the recipe's data and model.vocab_size to what"
                " is there"
            )
        if machine:
            logger.warning(
                "%s: used as it is, though this machine cannot make it again (%s)",
                directory,
                "; ".join(machine),
            )
    return data


def _ready(directory: Path) -> bool:
    """Whether a folder holds a finished preparation, or shards that are not being downloaded."""
    return (directory / MANIFEST).is_file() or (
        any(directory.glob("*.bin")) and not unfinished(directory)
    )


def _prepare(spec: PrepareSpec) -> None:
    """Prepares in a process without jax, whose workers start fast. The process ends before this
    function does.

    SIGTERM also ends that process, and then this one, quietly. Ctrl-C reaches both.
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
        # --json: no result and no next command on the terminal
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
            f"the preparation of {spec.out} was killed by {signal.Signals(-status).name}; to resume"
            f" it: {cli.command(COMMAND, *command_line(spec))}"
        )
    if status:
        raise SystemExit(status)
