"""JSON from anybody read into dataclasses, strictly: an error is one line that names the field."""

import collections
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from sngpt_jax.base import untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import shown

MAX_BYTES = 16 * 2**20  # of a file; its values take about 20 times as much memory
MAX_DEPTH = 64  # levels of nested objects and lists

T = TypeVar("T")
# of a field's name, value and place; raises if the value is not allowed
Check = Callable[[str, Any, str], None]


def loads(text: bytes, lone_surrogates: bool = False) -> Any:
    """The value of JSON in UTF-8.

    Raises `ValueError` for what is no JSON, and for JSON that readers understand differently: a
    repeated key, NaN, infinities, numbers beyond 64 bits, half of a surrogate pair (unless
    `lone_surrogates` lets it pass), more than `MAX_DEPTH` levels.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_float,
            object_pairs_hook=_object,
        )
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels deep") from None
    _check_text(value, MAX_DEPTH, lone_surrogates)
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{shown(digits)} is not an integer of 64 bits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is no finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys may not repeat."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(name)} is given twice")
    return values


def _check_text(value: Any, levels: int, lone_surrogates: bool) -> None:
    """Raises `ValueError` if `value` has more levels, or text that UTF-8 cannot hold."""
    if isinstance(value, str):
        if lone_surrogates or value.isascii():
            return
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{shown(value)} holds half of a surrogate pair") from None
    elif isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"more than {MAX_DEPTH} levels deep")
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_text(inner, levels - 1, lone_surrogates)


def read(path: Path, error: type[UserError]) -> Any:
    """The JSON value in the file `path`. Raises `error` in one line if the file has none, or has
    more than `MAX_BYTES`.
    """
    content = untrusted.read_bytes(path, MAX_BYTES, error)
    try:
        return loads(content)
    except ValueError as problem:
        raise error(f"{path}: cannot be read as JSON: {problem}") from None


def parse(
    kind: type[T],
    value: Any,
    where: str,
    error: type[UserError],
    check: Check | None = None,
    defaulted: list[str] | None = None,
) -> T:
    """The `kind`, a dataclass, from a JSON object of its fields. Every field must be there.

    Fields may be bool, int, float, str, Literal of strings, a dataclass, `X | None`, Any,
    `dict[str, X]`, `tuple[X, ...]`, or a NamedTuple from a list or tuple. An integer may become a
    float. `check` sees every plain value. With a list for `defaulted`, a field that has a plain
    default may be missing, and its path is appended there. Raises `error` in one line that begins
    with the path of the field, from `where` on.
    """

    def refuse(where: str, expected: str, value: Any) -> NoReturn:
        kind = type(value).__name__
        holds = isinstance(value, dict | list | tuple) or value is None
        found = kind if holds else f"{shown(value)} of type {kind}"
        raise error(f"{where}: expected {expected}, found {found}")

    def parse_object(kind: type, values: Any, where: str) -> Any:
        if not isinstance(values, dict):
            refuse(where, "an object", values)
        hints = typing.get_type_hints(kind)
        for name in values:
            if name not in hints:
                close = difflib.get_close_matches(name[:100], hints, n=1)
                advice = f"; did you mean {close[0]!r}?" if close else ""
                raise error(f"{where}: unknown key {shown(name)}{advice}")
        missing = [name for name in hints if name not in values]
        if defaulted is not None:
            fields = dataclasses.fields(kind)
            plain = {x.name for x in fields if x.default is not dataclasses.MISSING}
            defaulted.extend(f"{where}.{name}" for name in missing if name in plain)
            missing = [name for name in missing if name not in plain]
        if missing:
            raise error(f"{where}: missing {', '.join(missing)}")
        return kind(**{k: parse_value(hints[k], x, f"{where}.{k}") for k, x in values.items()})

    def parse_value(kind: Any, value: Any, where: str) -> Any:
        of, inner = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return parse_object(typing.cast(type, kind), value, where)
        if isinstance(kind, types.UnionType):  # the only unions are `X | None`
            return None if value is None else parse_value(inner[0], value, where)
        if isinstance(kind, type) and hasattr(kind, "_fields"):  # a NamedTuple
            hints = typing.get_type_hints(kind)
            if not isinstance(value, list | tuple) or len(value) != len(hints):
                refuse(where, f"a list of {', '.join(hints)}", value)
            return kind(*map(parse_value, hints.values(), value, [where] * len(hints)))
        if of is tuple:
            if not isinstance(value, list | tuple):
                refuse(where, "a list", value)
            return tuple(parse_value(inner[0], x, f"{where}[{i}]") for i, x in enumerate(value))
        if of is dict:
            if not isinstance(value, dict):
                refuse(where, "an object", value)
            return {k: parse_value(inner[1], x, f"{where}[{shown(k)}]") for k, x in value.items()}
        if of is Literal:
            if not isinstance(value, str) or value not in inner:
                refuse(where, f"one of {', '.join(inner)}", value)
        elif kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                raise error(f"{where}: expected float, found a larger integer") from None
        elif type(value) is not kind:
            refuse(where, kind.__name__, value)
        if check:
            check(where.rpartition(".")[2], value, where)
        return value

    return parse_object(kind, value, where)
