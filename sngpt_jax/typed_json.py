"""JSON read into dataclasses, strictly: an unknown, missing or ill-typed key is one line that says where."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, Literal, TypeVar

from sngpt_jax.cli import UserError

T = TypeVar("T")


def loads(kind: type[T], text: str, where: str, error: type[UserError] = UserError) -> T:
    """The `kind` (a dataclass) that the JSON object in `text` spells out field by field; every field must be there.

    Fields may be bool, int, float, str, Literal of strings, another dataclass, `tuple[X, ...]` from a list, and `X | None`.
    An integer serves as a float; nothing else is converted. Raises `error` in one line that begins with `where`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not JSON: {problem}") from None
    return _object(kind, values, where, error)


def _object(kind: type[T], values: Any, where: str, error: type[UserError]) -> T:
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
    return kind(**{name: _value(hints[name], value, f"{where}.{name}", error) for name, value in values.items()})


def _value(kind: Any, value: Any, where: str, error: type[UserError]) -> Any:
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind), value, where, error)
    if isinstance(kind, types.UnionType):  # the only unions are `X | None`
        return None if value is None else _value(typing.get_args(kind)[0], value, where, error)
    if typing.get_origin(kind) is Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise error(f"{where}: expected one of {', '.join(typing.get_args(kind))}, found {value!r}")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise error(f"{where}: expected a list, found {type(value).__name__}")
        return tuple(_value(typing.get_args(kind)[0], item, f"{where}[{i}]", error) for i, item in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise error(f"{where}: expected {kind.__name__}, found {value!r} of type {type(value).__name__}")
    return value
