"""Damaged files of every format are read to something whole or refused in one line."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config, OptimConfig, to_json
from sngpt_jax.config import file as config_file
from sngpt_jax.data.manifest import DataError, Manifest, load_journal, load_manifest
from sngpt_jax.data.shards import HEADER_BYTES, MAGIC, VERSION, open_shard
from sngpt_jax.run.metrics import read_metrics
from tests import fuzz

NAMES = """shard|byte corrections (npy)|manifest.json|progress.json|published manifest|config.json
|summary.json|metrics.jsonl|environment.jsonl|checkpoint record|tokenizer.json|tokenizer .model
|artifact's metadata|npz|safetensors"""
FORMATS = NAMES.replace("\n", "").split("|")
SHORT = 100


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return {kind.name: kind for kind in fuzz.make_formats(tmp_path_factory.mktemp("fuzz"))}


def test_every_format_is_here(formats):
    assert list(formats) == FORMATS


@pytest.mark.parametrize("name", FORMATS)
def test_some_damaged_files(name, formats):
    kind = formats[name]
    found = fuzz.fuzz(kind, SHORT // kind.per, seed=1)
    assert not found.others
    assert found.accepted or found.refused
    assert found.accepted + found.refused == found.examples


def test_the_harness_sees_what_it_looks_for(formats):
    """Other exceptions, lines that name nothing, and memory."""

    def failing(error=None, size=0):
        def read():
            if kind.target.read_bytes() != whole:
                np.zeros(size, np.int8)
                raise error

        return read

    kind = formats["summary.json"]
    whole = kind.target.read_bytes()
    named, two_lines = UserError(f"{kind.target}: x"), UserError(f"{kind.target}: a\nb")
    for read, seen in (
        (failing(KeyError("x")), True),
        (failing(UserError("nothing")), True),
        (failing(two_lines), True),
        (failing(named, fuzz.MOST_MEMORY + 2**20), True),
        (failing(named), False),
    ):
        assert bool(fuzz.fuzz(dataclasses.replace(kind, read=read), 5, seed=0).others) is seen


# ---------------------------------------- any content

SECTIONS = {field.name for kind in (Config, Manifest) for field in dataclasses.fields(kind)}
keys = st.text(max_size=9) | st.sampled_from(sorted(SECTIONS))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner),
    max_leaves=20,
)
texts = json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200)
READERS = {
    "config.json": config_file.read,
    "manifest.json": lambda path: load_manifest(path.parent),
    "progress.json": lambda path: load_journal(path.parent),
}


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=100)
@given(content=texts)
def test_no_other_content_is_one(name, tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)


@settings(max_examples=100)
@given(
    st.lists(json_values | st.fixed_dictionaries({"step": st.integers() | st.floats()})),
    st.binary(max_size=9),
)
def test_any_metrics_are_records_or_refused(tmp_path_factory, values, torn):
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes("".join(json.dumps(value) + "\n" for value in values).encode() + torn)
    try:
        assert all(-np.inf < record["step"] < np.inf for record in read_metrics(path))
    except UserError as error:
        assert str(path) in str(error)


ints = st.integers(-(2**31), 2**31 - 1)


@settings(max_examples=100)
@given(
    st.just(MAGIC) | ints,
    st.just(VERSION) | ints,
    st.integers(0, 20) | ints,
    st.integers(0, 2 * 20 + 1),
    st.binary(max_size=40),
)
def test_a_shard_is_exactly_its_header_and_its_tokens(
    tmp_path_factory, magic, version, count, size, start
):
    path = tmp_path_factory.getbasetemp() / "a_train_000000.bin"
    body = start.ljust(size, b"\1")[:size]
    path.write_bytes(struct.pack("<3i", magic, version, count).ljust(HEADER_BYTES, b"\0") + body)
    if (magic, version) == (MAGIC, VERSION) and count >= 1 and size == 2 * count:
        assert open_shard(path).tobytes() == body
    else:
        with pytest.raises(DataError, match="a_train_000000.bin"):
            open_shard(path)


@given(st.sampled_from(sorted(dataclasses.asdict(Config())["model"])), json_values)
def test_a_configuration_that_is_accepted_is_the_one_written(tmp_path_factory, field, value):
    path = tmp_path_factory.getbasetemp() / "config.json"
    good = Config(optim=OptimConfig(warmdown_steps=10))
    values = json.loads(to_json(good))
    values["model"][field] = value
    path.write_text(json.dumps(values))
    try:
        found = config_file.read(path)
    except UserError as error:
        assert str(error).startswith(str(path))
        return
    expected = tuple(value) if isinstance(value, list) else value
    model = dataclasses.replace(good.model, **{field: expected})
    assert found == dataclasses.replace(good, model=model)
    assert typed_json.loads(to_json(found).encode())["model"][field] == value
