"""A configuration as data: `config.json`, and the copy in an artifact's header. Nothing in it runs.

`FORMAT` rises when a field changes its meaning or disappears. A file that lacks a field takes the
default, which is what earlier versions did.
"""

import logging
from pathlib import Path
from typing import Any

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import shown
from sngpt_jax.config import FORMAT, Config, ConfigError, TrainConfig, changed, parse_levels
from sngpt_jax.config.checks import validate

logger = logging.getLogger("sngpt_jax")

# A configuration without these is not ours: every run has had them.
_SIZES = {
    "vocab_size",
    "num_layers",
    "d_model",
    "num_heads",
    "num_kv_heads",
    "mlp_dim",
    "max_seq_len",
}


def read(path: Path) -> Config:
    """The configuration in a `config.json`. Raises `ConfigError` in one line."""
    return parse(typed_json.read(path, ConfigError), str(path), ConfigError)


def parse(values: Any, where: str, error: type[UserError]) -> Config:
    """The configuration that a JSON object holds. Defaults of missing fields are logged.

    Raises `error` for another format, for what `typed_json` refuses, and for what cannot run.
    """
    defaulted: list[str] = []
    try:
        if isinstance(values, dict):
            values = dict(values)
            found = values.pop("format", FORMAT)  # the first runs wrote no number
            if type(found) is not int or found != FORMAT:
                raise ConfigError(
                    f"{where}: expected a configuration of format {FORMAT}, found {shown(found)};"
                    " use the program that made it"
                )
            model = values.get("model")
            if isinstance(model, dict) and isinstance(text := model.get("levels"), str):
                values["model"] = model | {"levels": parse_levels(text)}  # from an earlier version
            if isinstance(scoring := values.get("eval"), dict):  # earlier versions had one count
                values["eval"] = {"byte_count": "golf"} | scoring
        config = typed_json.parse(Config, values, where, ConfigError, defaulted=defaulted)
        names = [name.removeprefix(f"{where}.") for name in defaulted]
        if missing := [name for name in names if name.removeprefix("model.") in _SIZES]:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        validate(config)
    except ConfigError as problem:
        text = str(problem)[: 1000 + len(where)]
        raise error(text if text.startswith(where) else f"{where}: {text}") from None
    if names:
        logger.info(f"{where}: from an earlier version; defaults taken for {', '.join(names)}")
    return config


def with_own_cache(config: Config) -> Config:
    """`config` with this machine's folder of compiled programs, if it names one.

    XLA runs the programs in that folder, so a file from elsewhere must not choose it.
    """
    if not config.train.compilation_cache:
        return config
    return changed(config, train={"compilation_cache": TrainConfig.compilation_cache})
