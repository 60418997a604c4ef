"""Strict reading: what is right comes back equal, and anything else is the caller's error in one line."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.cli import UserError
from sngpt_jax.typed_json import parse, read


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


inners = st.builds(Inner, st.text(), st.lists(st.integers()).map(tuple))
outers = st.builds(
    Outer,
    st.booleans(),
    st.floats(allow_nan=False),
    st.sampled_from(["a", "b"]),
    inners,
    st.lists(inners, max_size=3).map(tuple),
    inners | st.none(),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text() | st.sampled_from(["flag", "inner", "name"]), x),
)


@given(outers)
def test_what_was_written_is_read(value):
    assert parse(Outer, json.loads(json.dumps(dataclasses.asdict(value))), "here", Broken) == value


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
    values = {"name": "x", "sizes": [1, 2]}
    parse(Inner, values, "here", Broken, lambda name, value, where: seen.append((name, value, where)))
    assert seen == [("name", "x", "here.name"), ("sizes[0]", 1, "here.sizes[0]"), ("sizes[1]", 2, "here.sizes[1]")]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_holds_no_json_is_refused(content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(Broken, match=r"file\.json: cannot be read"):
        read(tmp_path / "file.json", Broken)
    with pytest.raises(Broken, match="missing.json: cannot be read: No such file"):
        read(tmp_path / "missing.json", Broken)
