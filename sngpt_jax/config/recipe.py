"""A configuration read from a recipe, a run's config.json, and the command line.

A recipe is a Python file that binds one `Config` to the name `config`. A run directory's
`config.json` is the same thing as data and replays the run exactly.
"""

import argparse
import dataclasses
import difflib
import runpy
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from sngpt_jax.base import typed_json
from sngpt_jax.config import Config, ConfigError
from sngpt_jax.config import file as config_file
from sngpt_jax.config.checks import validate

T = TypeVar("T")


def _recipe_path(name: str) -> Path:
    here = Path(__file__).resolve().parents[1]
    # the last is where a wheel carries them
    folders = [Path("configs"), here.parent / "configs", here / "configs"]
    if Path(name).is_file():
        return Path(name)
    if "/" not in name and not name.endswith((".py", ".json")):
        for folder in folders:
            if (folder / f"{name}.py").is_file():
                return folder / f"{name}.py"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"recipes: {', '.join(known)}"
    raise ConfigError(f"--config {name}: no such file or recipe; {hint}")


def load(name: str) -> Config:
    """The configuration that a recipe file, a bare recipe name, or a `config.json` holds. Recipes
    are code and are run; a `config.json` is data, and keeps compiled programs where this machine
    does.
    """
    path = _recipe_path(name)
    if path.suffix == ".json":
        return config_file.with_own_cache(config_file.read(path))
    try:
        config = runpy.run_path(str(path)).get("config")
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{path}: the recipe does not run: {type(error).__name__}: {error}"
        ) from None
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path}: a recipe binds a sngpt_jax.config.Config to the name `config`; found"
            f" {type(config).__name__}"
        )
    # Python checks no types: a recipe is held to the same rules as a config.json
    return validate(typed_json.parse(Config, dataclasses.asdict(config), str(path), ConfigError))


def recipe_name(name: str) -> str:
    """The name under which runs of `--config name` are kept: the recipe's, or NAME-replay for the
    config.json of a run NAME.
    """
    path = Path(name)
    return f"{path.resolve().parent.name}-replay" if path.suffix == ".json" else path.stem


# ---------------------------------------------------------------------------------------------- the command line

# A command's field of this type becomes `--section.field value` options.
Overrides = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]


def peek(argv: Sequence[str], option: str) -> str:
    """The value that `argv` gives `option`, or nothing: what other options' defaults depend on."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", default="")
    return str(parser.parse_known_args(argv)[0].value)


def parse_command(kind: type[T], argv: Sequence[str], *, program: str, description: str) -> T:
    """Parses `argv` into the dataclass `kind`, whose fields include `config: str` and `overrides:
    Overrides`.

    `--config` is loaded first, so that `--help` shows the recipe's own values as defaults. tyro
    prints its usage box for an unknown or mistyped option and exits with status 2. The result's
    `overrides` is the validated configuration.
    """
    name = peek(argv, "--config")
    base = load(name) if name else Config()
    settings = (tyro.conf.OmitSubcommandPrefixes,)
    default: Any = typing.cast(Any, kind)(config=name or tyro.MISSING, overrides=base)
    arguments: Any = tyro.cli(
        kind,
        args=list(argv),
        prog=program,
        description=description,
        config=settings,
        default=default,
    )
    validate(arguments.overrides)
    return arguments
