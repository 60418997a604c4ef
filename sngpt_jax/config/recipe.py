"""Reads a configuration from a recipe, from a run's config.json, and from the command line.

A recipe is a Python file that binds one `Config` to the name `config`.
"""

import argparse
import dataclasses
import difflib
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from sngpt_jax.base.files import at_home
from sngpt_jax.config import Config, ConfigError, Level, format_levels, parse_levels
from sngpt_jax.config import file as config_file
from sngpt_jax.config.checks import validate
from sngpt_jax.config.command import parse

T = TypeVar("T")


def _recipe_path(name: str) -> Path:
    package = Path(__file__).resolve().parents[1]
    # the working directory, the checkout, and the place in a wheel
    folders = [Path("configs"), package.parent / "configs", package / "configs"]
    candidates = [Path(name)]
    if "/" not in name and not name.endswith((".py", ".json")):
        candidates += [folder / f"{name}.py" for folder in folders]
    for path in candidates:
        if path.is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.py")})
    close = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"recipes: {', '.join(known)}"
    raise ConfigError(f"--config {name}: no such file or recipe; {hint}")


def load(name: str) -> Config:
    """The configuration of a recipe file, which is run, a bare recipe name, or a `config.json`.

    Raises `ConfigError` in one line.
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
            f"{path}: `config` is not a sngpt_jax.config.Config; found {type(config).__name__}"
        )
    # Python checks no types, so a recipe is read by the rules of a config.json
    return config_file.parse(dataclasses.asdict(config), str(path), ConfigError)


def recipe_name(name: str) -> str:
    """The name of a run of `--config name`: the recipe's, or RUN-replay for RUN/config.json."""
    path = Path(name)
    return f"{path.resolve().parent.name}-replay" if path.suffix == ".json" else path.stem


# A command's field of this type becomes `--section.field value` options.
Overrides = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]

# in arguments that \0 separates, which none of them holds
_AUTO = re.compile(r"(?<![^\0])(--train\.device[-_]batch[-_]tokens[=\0])auto(?![^\0])")

_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _levels_as_text(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[tuple[Level, ...]] | None:
    """`model.levels` is one text on the command line."""
    if info.type != tuple[Level, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,K,DEGREE;...",
        instance_from_str=lambda texts: parse_levels(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda levels: [format_levels(levels)],
    )


def peek(argv: Sequence[str], option: str) -> str:
    """The value of `option` in `argv`, or "". Other options' defaults depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", default="")
    return at_home(parser.parse_known_args(argv)[0].value)


def named_fields(argv: Sequence[str]) -> frozenset[str]:
    """The fields that options of `argv` set, as `section.field`."""
    options = (word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    return frozenset(option.replace("-", "_") for option in options if "." in option)


def parse_command(kind: type[T], argv: Sequence[str], *, program: str, description: str) -> T:
    """Parses `argv` into the dataclass `kind` with `config: str` and `overrides: Overrides`.

    `--config` is loaded first, so that `--help` shows the recipe's values as defaults. The result's
    `overrides` is the validated configuration. tyro exits with status 2 for an unknown option.
    """
    name = peek(argv, "--config")
    make: Any = kind
    arguments: Any = parse(
        kind,
        _AUTO.sub(r"\g<1>0", "\0".join(argv)).split("\0") if argv else [],
        program=program,
        description=description,
        config=(tyro.conf.OmitSubcommandPrefixes,),
        default=make(config=name or tyro.MISSING, overrides=load(name) if name else Config()),
        registry=_REGISTRY,
    )
    validate(arguments.overrides)
    return arguments
