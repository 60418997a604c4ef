"""JSON read into dataclasses, strictly: an unknown, missing or ill-typed key is one line that says where."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from sngpt_jax.cli import UserError

T = TypeVar("T")
Check = Callable[[str, Any, str], None]  # of a field's name, its value, and where it stands; raises where it may not be


def read(path: Path, error: type[UserError]) -> Any:
    """The JSON value in the file `path`; raises `error` in one line where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: cannot be read as JSON: {problem}") from None


def parse(kind: type[T], value: Any, where: str, error: type[UserError], check: Check | None = None) -> T:
    """The `kind` (a dataclass) that a JSON object spells out field by field; every field must be there.

    Fields may be bool, int, float, str, Literal of strings, another dataclass, `X | None`, or `tuple[X, ...]` from a list or
    tuple. An integer serves as a float; nothing else is converted. `check` sees every plain value. Raises `error` in one
    line that begins with the path of the field, `where` for the whole.
    """

    def parse_object(kind: type, values: Any, where: str) -> Any:
        if not isinstance(values, dict):
            raise error(f"{where}: expected an object, found {type(values).__name__}")
        hints = typing.get_type_hints(kind)
        for name in values:
            if name not in hints:
                close = difflib.get_close_matches(name, hints, n=1)
                raise error(f"{where}: unknown key {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        missing = [name for name in hints if name not in values]
        if missing:
            raise error(f"{where}: missing {', '.join(missing)}")
        return kind(**{name: parse_value(hints[name], value, f"{where}.{name}") for name, value in values.items()})

    def parse_value(kind: Any, value: Any, where: str) -> Any:
        if dataclasses.is_dataclass(kind):
            return parse_object(typing.cast(type, kind), value, where)
        if isinstance(kind, types.UnionType):  # the only unions are `X | None`
            return None if value is None else parse_value(typing.get_args(kind)[0], value, where)
        if typing.get_origin(kind) is tuple:
            if not isinstance(value, list | tuple):
                raise error(f"{where}: expected a list, found {type(value).__name__}")
            return tuple(parse_value(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if typing.get_origin(kind) is Literal:
            if not isinstance(value, str) or value not in typing.get_args(kind):
                raise error(f"{where}: expected one of {', '.join(typing.get_args(kind))}, found {value!r}")
        elif kind is float and type(value) is int:
            value = float(value)
        elif type(value) is not kind:
            raise error(f"{where}: expected {kind.__name__}, found {value!r} of type {type(value).__name__}")
        if check:
            check(where.rpartition(".")[2], value, where)
        return value

    return parse_object(kind, value, where)
