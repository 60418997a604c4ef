"""The data that a recipe names: opened, and prepared first if that needs no network."""

import logging
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from sngpt_jax.base import cli
from sngpt_jax.base.errors import EXIT_SIGTERM, UserError
from sngpt_jax.base.files import visible
from sngpt_jax.config import Config, DataConfig, changed
from sngpt_jax.config.checks import validate
from sngpt_jax.data.encode import usable_cpus
from sngpt_jax.data.manifest import MANIFEST
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import Dataset, open_dataset, unfinished
from sngpt_jax.data.spec import COMMAND, PrepareSpec, command_line, differing
from sngpt_jax.data.tokenizer import MAX_VOCAB

logger = logging.getLogger("sngpt_jax")

# of a table for a given tokenizer, whose size was rounded up: 50,304 rows for 50,257 tokens
_SPARE_ROWS = 127


def spec_of(config: Config) -> PrepareSpec:
    """What the recipe has prepared."""
    d = config.data
    drawn = not (d.val_source or d.val_docs)
    return PrepareSpec(
        source=d.source,
        out=d.dir,
        tokenizer=d.tokenizer,
        val_source=d.val_source,
        val_docs=0 if d.val_source else d.val_docs,
        val_fraction=d.val_fraction if drawn else 0.0,
        split_seed=d.split_seed if drawn else 0,
        max_tokens=d.max_tokens,
        vocab_size=config.model.vocab_size,
        normalization=d.normalization,
        text_key=d.text_key,
        split_on=d.split_on,
    )


def from_folder(config: Config, named: Collection[str]) -> Config:
    """`config` with what only concerns preparation taken from `data.dir`, if that is among the
    fields that the user `named`.

    The model gets as many rows as the folder's tokenizer has tokens, if the user did not say how
    many. It keeps the recipe's if they are at most `_SPARE_ROWS` more. Raises `UserError` if the
    folder has no whole data, or contradicts what the user named.
    """
    if "data.dir" not in named:
        return config
    data = open_dataset(config.data.dir, MAX_VOCAB)
    tokens, changes = data.tokenizer.vocab_size, dict[str, Any]()
    learnt = False
    if (manifest := data.manifest) and config.data.source:
        origin, directory = manifest.origin, data.directory
        learnt = origin.tokenizer == "train"
        other, machine = differing(spec_of(config), manifest)
        if config.data.max_tokens and "data.max_tokens" in named:
            other |= origin.differences({"max_tokens": config.data.max_tokens})
        if not learnt:  # a larger table serves any tokenizer
            other.pop("vocab_size", None)
        option = {"vocab_size": "model.vocab_size"}
        if refused := [other[x] for x in other if option.get(x, f"data.{x}") in named]:
            remedy = "leave these options out, or choose another --data.dir"
            raise UserError(f"{directory}: prepared otherwise ({'; '.join(refused)}); {remedy}")
        if other or machine:
            names = ("val_docs", "val_fraction", "split_seed", "max_tokens", "text_key", "split_on")
            changes = {"source": "", "val_source": ""} | {x: getattr(origin, x) for x in names}
            changes["tokenizer"] = "train" if learnt else str(directory / manifest.tokenizer.file)
            if origin.normalization in get_args(DataConfig.__annotations__["normalization"]):
                changes["normalization"] = origin.normalization
    elif not _on_network(config.data.source):
        changes = {"source": ""}
    rows = config.model.vocab_size
    fits = tokens <= rows <= tokens + (0 if learnt else _SPARE_ROWS)
    size = rows if fits or "model.vocab_size" in named else tokens
    return validate(changed(config, data=changes, model={"vocab_size": size}))


def _on_network(source: str) -> bool:
    return source.startswith(("hub:", "golf"))


def prepared_data(config: Config) -> Dataset:
    """The recipe's data, prepared first if they are not complete and their source is here.

    SIGTERM ends a preparation with `SystemExit`. Raises `UserError` if the source is on the network
    or unusable, or if the folder was prepared with other settings than the recipe's.
    """
    d, directory, spec = config.data, Path(config.data.dir), spec_of(config)
    if d.source and not _ready(directory):
        if _on_network(d.source):
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
                f"{directory}: prepared with other settings than the recipe's"
                f" ({'; '.join(other.values())});"
                " choose another --data.dir, or change the recipe's data and model.vocab_size"
            )
        if machine:
            again = "used as it is, though this machine cannot make it again"
            logger.warning(f"{directory}: {again} ({'; '.join(machine)})")
    return data


def _ready(directory: Path) -> bool:
    """Whether a folder holds a finished preparation, or shards that are not being downloaded."""
    return (directory / MANIFEST).is_file() or (
        bool(visible(directory, "*.bin")) and not unfinished(directory)
    )
