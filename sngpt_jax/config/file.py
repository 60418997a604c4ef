"""A configuration as data: `config.json`, and the copy in an artifact's header. Nothing in it
runs, wherever it is from.

The number of the format is raised when a field changes its meaning or goes. A field that is added
keeps it: its default is what runs did before, and a file that lacks it takes that.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import shown
from sngpt_jax.config import FORMAT, Config, ConfigError, TrainConfig
from sngpt_jax.config.checks import validate

logger = logging.getLogger("sngpt_jax")

# Without these it is no configuration of ours; every run has had them.
_SIZES = (
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "mlp_dim",
    "max_seq_len",
)


def read(path: Path) -> Config:
    """The configuration in a `config.json`. Raises `ConfigError` in one line."""
    return parse(typed_json.read(path, ConfigError), str(path), ConfigError)


def parse(values: Any, where: str, error: type[UserError]) -> Config:
    """The configuration that a JSON object spells out. Fields that it lacks take their defaults,
    which the log says once.

    Raises `error` for another format, for what `typed_json` refuses, and for what cannot run.
    """
    if isinstance(values, dict):
        values = dict(values)
        found = values.pop("format", FORMAT)  # runs made before there was a number lack it
        if type(found) is not int or found != FORMAT:
            raise error(
                f"{where}: expected a configuration of format {FORMAT}, found {shown(found)}; use"
                " the program that made it"
            )
    defaulted: list[str] = []
    config = typed_json.parse(Config, values, where, error, defaulted=defaulted)
    names = [name.removeprefix(f"{where}.") for name in defaulted]
    if missing := [name for name in names if name in {f"model.{size}" for size in _SIZES}]:
        raise error(f"{where}: missing {', '.join(missing)}")
    try:
        validate(config)
    except ConfigError as problem:
        raise error(f"{where}: {str(problem)[:1000]}") from None
    if names:
        logger.info(
            f"{where}: of an earlier version, without {', '.join(names)}; taking the defaults"
        )
    return config


def with_own_cache(config: Config) -> Config:
    """`config` with this machine's folder of compiled programs, where it names one: XLA runs what
    lies in that folder, so a file from elsewhere does not choose it."""
    if not config.train.compilation_cache:
        return config
    train = dataclasses.replace(config.train, compilation_cache=TrainConfig().compilation_cache)
    return dataclasses.replace(config, train=train)
