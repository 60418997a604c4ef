"""Strict reading: right values come back equal, and others are the caller's error in one line."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.typed_json import MAX_BYTES, MAX_DEPTH, loads, parse, read


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Outer:
    flag: bool
    rate: float
    kind: Literal["a", "b"]
    inner: Inner
    more: tuple[Inner, ...]
    maybe: Inner | None


class Broken(UserError):
    pass


integers = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]))
inners = st.builds(Inner, texts, st.lists(integers).map(tuple))
outers = st.builds(
    Outer,
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["a", "b"]),
    inners,
    st.lists(inners, max_size=3).map(tuple),
    inners | st.none(),
)
keys = st.text() | st.sampled_from(["flag", "inner", "name"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(keys, x),
)


@given(outers)
def test_what_was_written_is_read(value):
    text = json.dumps(dataclasses.asdict(value)).encode()
    assert parse(Outer, loads(text), "here", Broken) == value


@given(outers, st.sampled_from([f.name for f in dataclasses.fields(Outer)]), json_values)
def test_a_changed_field_is_read_or_refused_in_one_line(value, name, changed):
    values = json.loads(json.dumps(dataclasses.asdict(value)))
    values[name] = changed
    try:
        assert isinstance(parse(Outer, values, "here", Broken), Outer)
    except Broken as error:
        assert str(error).startswith(f"here.{name}")


@given(json_values)
def test_any_other_shape_is_refused(value):
    with pytest.raises(Broken, match="here"):
        parse(Outer, value, "here", Broken)


def test_the_check_sees_every_plain_value_and_its_place():
    seen = []
    parse(Inner, {"name": "x", "sizes": [1]}, "here", Broken, lambda *of: seen.append(of))
    assert seen == [("name", "x", "here.name"), ("sizes[0]", 1, "here.sizes[0]")]


@dataclass(frozen=True)
class Defaults:
    inner: Inner
    rate: float = 0.5
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    anything: Any = None


def test_missing_fields_take_plain_defaults_where_asked():
    defaulted, inner = [], {"inner": {"name": "x", "sizes": []}}
    found = parse(Defaults, inner | {"counts": {"a": 1}}, "here", Broken, defaulted=defaulted)
    assert found == Defaults(Inner("x", ()), counts={"a": 1})
    assert defaulted == ["here.rate", "here.anything"]
    for values, where, message in (
        (inner | {"counts": {}}, None, "here: missing rate, anything"),
        ({}, [], "here: missing inner, counts"),
        (inner | {"counts": {"a": "1"}}, [], r"here.counts\['a'\]: expected int, found '1'"),
        (inner | {"counts": {}, "rate": 10**400}, [], "rate: expected float, found a larger int"),
    ):
        with pytest.raises(Broken, match=message):
            parse(Defaults, values, "here", Broken, defaulted=where)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        (b"[NaN]", "'NaN' is no finite number"),
        (b"[-Infinity]", "'-Infinity' is no finite number"),
        (b"1e999", "'1e999' is no finite number"),
        (b"9223372036854775808", "not an integer of 64 bits"),
        (b"-9223372036854775809", "not an integer of 64 bits"),
        (b"1" * 10_000, "not an integer of 64 bits"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'{"\\ud800": 0}', "half of a surrogate pair"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "64 levels deep"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'"\xff"', "utf-8"),
        ('"é"'.encode("utf-16"), "utf-8"),
    ],
)
def test_json_that_readers_differ_on_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        loads(text)


def test_the_extremes_that_are_read():
    assert loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    found = loads(b'[9223372036854775807, -9223372036854775808, 1e308, "\\ud83d\\ude00"]')
    assert found == [2**63 - 1, -(2**63), 1e308, "\U0001f600"]


def test_a_file_that_is_too_large_or_no_file_is_not_read(tmp_path):
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no room
    message = r"large\.json: 16,777,217 bytes; no file of its kind has more than 16,777,216"
    with pytest.raises(Broken, match=message):
        read(tmp_path / "large.json", Broken)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(Broken, match=r"pipe\.json: cannot be read: not a plain file"):
        read(tmp_path / "pipe.json", Broken)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_holds_no_json_is_refused(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(Broken, match=r"file\.json: cannot be read"):
        read(tmp_path / "file.json", Broken)
    with pytest.raises(Broken, match="missing.json: cannot be read: No such file"):
        read(tmp_path / "missing.json", Broken)
