"""A command line parsed into a dataclass, with the paths in it expanded."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from sngpt_jax.base.files import at_home
from sngpt_jax.config.fields import PATH

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], *, program: str, **options: Any) -> T:
    """`argv` as the dataclass `kind`; `options` are tyro's. A path that begins with ~ or ~user
    means that home folder. Text is taken as it is. tyro exits with status 2 for an unknown option.
    """
    make: Any = tyro.cli  # its type has no overload for a kind that is not known here
    return _expanded(make(kind, args=list(argv), prog=program, **options))


def _expanded(arguments: T) -> T:
    """`arguments`, a dataclass, with its paths expanded: those of type `Path`, and texts that are
    annotated as `PATH`.
    """

    def new(value: Any, hint: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _expanded(value)
        if isinstance(value, Path):
            return Path(at_home(str(value)))
        if isinstance(value, tuple):
            return tuple(new(x, None) for x in value)
        if isinstance(value, str) and PATH in getattr(hint, "__metadata__", ()):
            return at_home(value)
        return value

    instance: Any = arguments
    hints = typing.get_type_hints(type(instance), include_extras=True)
    changes = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if (found := new(value, hints[field.name])) != value:
            changes[field.name] = found
    return dataclasses.replace(instance, **changes) if changes else arguments
