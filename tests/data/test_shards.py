"""Shards against golden bytes, the stream against plain indexing, and damaged folders."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base import cli
from sngpt_jax.data import manifest as manifests
from sngpt_jax.data import shards
from sngpt_jax.data.manifest import ExtraEntry, Manifest, Origin, ShardEntry, TokenizerEntry
from sngpt_jax.data.shards import (
    TokenStream,
    open_dataset,
    open_extra,
    open_headerless,
    open_shard,
    write_shard,
)
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from tests.data.conftest import BytesOfPair, damaged, stream_of

GOLDEN = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + bytes([1, 0, 0x34, 0x12, 0xFF, 0xFF])
VOCAB = 300
ORIGIN = Origin("source", "", 1, "train", VOCAB, "identity", 4, 0)


# ---------------------------------------- one file


def test_byte_corrections_are_what_their_header_says(tmp_path):
    path = tmp_path / "extra.npy"
    np.save(path, np.array([[3, 1], [9, 2]]))
    whole = path.read_bytes()
    np.testing.assert_array_equal(open_extra(path, 10, 2), [[3, 1], [9, 2]])
    for content, said in (
        (whole.replace(b"(2, 2), }          ", b"(2, 1000000000), } "), "mmap length"),
        (whole.replace(b"NUMPY\1", b"NUMPY\3"), "version 1.0 of npy"),
        (whole[:-1], "mmap length"),
        (b"PK", "magic string"),
    ):
        path.write_bytes(content)
        damaged(rf"extra\.npy: cannot be read: .*{said}", open_extra, path, 10, 2)
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros((1, 2), np.int64))
    damaged("extra", open_extra, path, 10, 2)
    np.save(path, np.zeros((11, 2), np.int64))
    damaged("expected at most 10 rows, found 11", open_extra, path, 10, 2)
    for other in (np.zeros((3, 2), np.int32), np.zeros((3, 3), np.int64), np.zeros(2, np.int64)):
        np.save(path, other)
        damaged(rf"expected int64 \[n, 2\], found {other.dtype} \[", open_extra, path, 10, 2)
    # each difference wraps to above 0
    np.save(path, np.array([[0, 1], [2**63 - 1, 1], [-(2**63), 1], [-1, 1], [5, 1]]))
    damaged("expected ascending token positions below 10", open_extra, path, 10, 2)


def test_a_shard_has_the_published_bytes(tmp_path):
    path = tmp_path / "x.bin"
    digest = write_shard(path, np.array([1, 0x1234, 0xFFFF], np.uint16))
    assert path.read_bytes() == GOLDEN
    assert digest == hashlib.sha256(GOLDEN).hexdigest()
    assert list(open_shard(path)) == [1, 0x1234, 0xFFFF]
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]  # no temporary file stays behind


def header(magic=20240520, version=1, count=3):
    return struct.pack("<256i", magic, version, count, *[0] * 253)


@pytest.mark.parametrize(
    "content, message",
    [
        (GOLDEN[:-1], "truncated: expected 1030 bytes for 3 tokens, found 1029"),
        (GOLDEN[:1024], "truncated: expected 1030 bytes for 3 tokens, found 1024"),
        (GOLDEN + b"\0\0", "oversized: expected 1030 bytes for 3 tokens, found 1032"),
        (GOLDEN[:1000], "truncated: expected 1030 bytes for 3 tokens, found 1000"),
        (b"", "not a token shard: expected magic 20240520 and version 1, found 0 and 0"),
        (header(magic=20240521) + b"\0" * 6, "found 20240521 and 1"),
        (header(version=2) + b"\0" * 6, "found 20240520 and 2"),
        (header(count=0), "expected at least 1 token, found a count of 0"),
        (header(count=-1), "expected at least 1 token, found a count of -1"),
    ],
)
def test_a_damaged_shard_says_what_was_expected_and_found(tmp_path, content, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    damaged(f"{path}: .*{message}", open_shard, path)


def test_nanogpts_files_are_tokens_alone(tmp_path):
    path = tmp_path / "train.bin"
    np.array([5, 50256, 7], np.uint16).tofile(path)
    assert list(open_headerless(path)) == [5, 50256, 7]
    for content in (b"\0\0\0", b""):
        path.write_bytes(content)
        message = f"train.bin: expected uint16 tokens.*found {len(content)} bytes"
        damaged(message, open_headerless, path)
    path.write_bytes(GOLDEN)
    damaged("found a shard header", open_headerless, path)


# ---------------------------------------- the stream


PIECES = st.lists(
    st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), min_size=1, max_size=5
)


@given(PIECES, st.integers(0, 10**15), st.integers(0, 60))
def test_take_is_indexing_modulo_the_length(pieces, start, count):
    stream, whole = stream_of(*pieces), np.concatenate([np.array(p, np.uint16) for p in pieces])
    taken = stream.take(start, count)
    assert taken.dtype == np.uint16 and len(stream) == len(whole)
    np.testing.assert_array_equal(taken, whole[[(start + i) % len(whole) for i in range(count)]])


def test_a_token_outside_the_vocabulary_names_its_file():
    stream = stream_of([1, 2, 9], [3, 4, 10, 11], vocab_size=10)
    assert list(stream.take(0, 5)) == [1, 2, 9, 3, 4]
    message = r"1\.bin: expected tokens below the vocabulary size 10, found 10 at token 2"
    damaged(message, stream.take, 2, 5)


def test_an_empty_stream_is_refused():
    damaged("at least one", TokenStream, (), 10)


@given(PIECES, st.integers(1, 7), st.data())
def test_bytes_are_of_each_token_after_the_one_before_plus_corrections(pieces, block, data):
    extras, expected = [], []
    previous = None
    for piece in pieces:
        rows = sorted(data.draw(st.sets(st.integers(0, len(piece) - 1))))
        corrections = [[row, 10**9 + row, row, -row, 1] for row in rows]
        extras.append(np.array(corrections, np.int64).reshape(-1, 5))
        for place, token in enumerate(piece):
            own = 0 if previous is None else previous * 1000 + token
            here = place in rows
            more = np.array([10**9 + place, place, -place, 1]) * here
            expected.append(np.array([own, own, own, 0]) + more)
            previous = token
    stream = stream_of(*pieces, extras=extras)
    start = data.draw(st.integers(1, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    with mock.patch.object(shards, "_COUNT_BLOCK", block):
        found = stream.count_bytes(BytesOfPair(), start, stop)
    assert found == tuple(sum(expected[start:stop], np.zeros(4, int)))


# ---------------------------------------- a folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    words = ["first", "second", "third", "plain"] * 8
    texts = [f"the {word} of a small tokenizer, number {i}" for i, word in enumerate(words)]
    train_sentencepiece(iter(texts), path, vocab_size=VOCAB, normalization="identity")
    return path


@pytest.fixture
def folder(tmp_path, tokenizer_file):
    """A folder with a manifest; the second training shard has a correction."""
    directory = tmp_path / "set"
    directory.mkdir()
    shutil.copy(tokenizer_file, directory / "tokenizer.model")
    tokenizer = load_tokenizer(tokenizer_file)
    sidecar = "train_000001.bin.extra.npy"
    np.save(directory / sidecar, np.array([[1, 4, 3, 5, 1]], np.int64))
    extra = ExtraEntry(sidecar, hashlib.sha256((directory / sidecar).read_bytes()).hexdigest())

    def entry(name, tokens, extra=None):
        digest = write_shard(directory / name, np.array(tokens, np.uint16))
        return ShardEntry(name, len(tokens), 1, 3, 2, 4, 1, digest, extra)

    train = (entry("train_000000.bin", [1, 9, 8, 7]), entry("train_000001.bin", [1, 3, 6], extra))
    about = dataclasses.replace(tokenizer.entry(), file="tokenizer.model")
    manifest = Manifest(2, ORIGIN, about, train, (entry("val_000000.bin", [1, 5]),))
    manifests.save(manifest, directory)
    return directory


def test_a_folder_opens_as_its_manifest_says(folder):
    data = open_dataset(str(folder), VOCAB)
    assert data.train.take(0, 8).tolist() == [1, 9, 8, 7, 1, 3, 6, 1]
    assert data.val.take(0, 2).tolist() == [1, 5]
    assert data.train.extra(0, 7).tolist() == [[5, 4, 3, 5, 1]]
    assert data.tokenizer.vocab_size == VOCAB
    assert manifests.verify(folder) == data.manifest == manifests.load_manifest(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "manifest.json: unknown key 'colour'"),
        ("format", 3, "manifest.json: expected format 2, found 3"),
        ("train", {}, "manifest.json.train: expected a list, found dict"),
        ("tokenizer", [], "manifest.json.tokenizer: expected an object, found list"),
        ("train.1.tokens", "4", "train[1].tokens: expected int, found '4'"),
        ("train.1.tokens", True, "train[1].tokens: expected int, found True"),
        ("train.1.text_bytes", -1, "train[1].text_bytes: expected a count of at least 0, found -1"),
        ("train.0.sha256", "abc", "train[0].sha256: expected 64 hexadecimal digits, found 'abc'"),
        ("train.0.name", "../train_000000.bin", "plain file name, found '../train_000000.bin'"),
        ("train.0.name", "/etc/passwd", "expected a plain file name, found '/etc/passwd'"),
        ("train.0.name", "..", "expected a plain file name, found '..'"),
        ("train.1.extra.name", "a\\b", "train[1].extra.name: expected a plain file name"),
        ("tokenizer.file", "", "tokenizer.file: expected a plain file name, found ''"),
        ("val.0.name", "train_000000.bin", "names train_000000.bin twice"),
        ("train.0.tokens", 5, "train_000000.bin: expected 5 tokens as manifest.json says, found 4"),
        ("val", [], "manifest.json names no shards of val"),
        ("val", None, "manifest.json.val: expected a list, found NoneType"),
    ],
)
def test_a_wrong_manifest_is_one_line(folder, path, value, message):
    manifest = values = json.loads((folder / "manifest.json").read_text())
    *outer, last = path.split(".")
    for key in outer:
        values = values[int(key) if key.isdigit() else key]
    values[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    damaged(re.escape(message), open_dataset, folder, VOCAB)


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_missing_damaged_and_swapped_files_are_named(folder, tokenizer_file):
    def refused(message, vocab_size=VOCAB):
        damaged(message, open_dataset, folder, vocab_size)

    too_many = f"expected at most model.vocab_size = {VOCAB - 1} tokens, found {VOCAB}"
    refused(too_many, VOCAB - 1)

    shard = folder / "train_000001.bin"
    whole = shard.read_bytes()
    flip_last_byte(shard)  # within the vocabulary and of the right size: only the checksum tells
    refused("train_000001.bin: expected SHA-256")
    shard.write_bytes(whole[:-2])
    refused("train_000001.bin: truncated")
    shard.unlink()
    refused("train_000001.bin: missing")
    shard.write_bytes(whole)

    sidecar = folder / "train_000001.bin.extra.npy"
    for rows in ([[3] * 5], [[-1] * 5], [[1] * 5, [1] * 5], [[1, 4]]):
        np.save(sidecar, np.array(rows, np.int64))
        refused("train_000001.bin.extra.npy: expected")
    np.save(sidecar, np.array([{}]), allow_pickle=True)
    refused("train_000001.bin.extra.npy: cannot be read")
    np.save(sidecar, np.array([[1, 5, 3, 5, 1]], np.int64))
    refused("train_000001.bin.extra.npy: expected SHA-256")
    np.save(sidecar, np.array([[1, 4, 3, 5, 1]], np.int64))
    open_dataset(folder, VOCAB)

    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes() + b"\n")
    refused("not the tokenizer that the shards were made with")
    (folder / "tokenizer.model").unlink()
    refused("tokenizer.model: expected SHA-256")


def test_checksums_of_a_large_set_are_left_to_verify(folder, monkeypatch):
    monkeypatch.setattr(shards, "_VERIFIED_BYTES", 0)
    flip_last_byte(folder / "train_000001.bin")
    open_dataset(folder, VOCAB)
    damaged(r"train_000001\.bin: expected SHA-256", manifests.verify, folder)


def test_published_shards_without_a_manifest(tmp_path, tokenizer_file):
    shutil.copy(tokenizer_file, tmp_path / "fineweb_300_bpe.model")
    pieces = {"train_000001": [4, 5], "train_000000": [1, 2], "val_000000": [1, 9]}
    for name, tokens in pieces.items():
        write_shard(tmp_path / f"fineweb_{name}.bin", np.array(tokens, np.uint16))
    data = open_dataset(tmp_path, VOCAB)
    assert data.train.take(0, 4).tolist() == [1, 2, 4, 5]
    assert data.val.take(0, 2).tolist() == [1, 9]
    assert data.manifest is None
    (tmp_path / ".download").mkdir()
    damaged("run the same prepare command again", open_dataset, tmp_path, VOCAB)
    (tmp_path / ".download").rmdir()
    shutil.copy(tokenizer_file, tmp_path / "other.model")
    message = r"expected one tokenizer .* found fineweb_300_bpe\.model, other\.model"
    damaged(message, open_dataset, tmp_path, VOCAB)
    (tmp_path / "fineweb_val_000000.bin").unlink()
    os.mkfifo(tmp_path / "fineweb_val_000000.bin")
    damaged(r"val_000000\.bin: cannot be read: not a plain file", open_dataset, tmp_path, VOCAB)


def test_nanogpts_folder(tmp_path, tokenizer_file):
    np.array([1, 2, 3], np.uint16).tofile(tmp_path / "train.bin")
    np.array([7], np.uint16).tofile(tmp_path / "val.bin")
    damaged("expected one tokenizer", open_dataset, tmp_path, VOCAB)
    shutil.copy(tokenizer_file, tmp_path / "small.model")
    data = open_dataset(tmp_path, VOCAB)
    assert data.train.take(0, 3).tolist() == [1, 2, 3] and len(data.val) == 1


def test_a_folder_that_is_missing_empty_or_unfinished_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = f"{cli.command('sngpt_jax.prepare')} --out 'no where' --source"
    message = rf"{tmp_path}/no where: no such folder; .*--data\.dir DIR.*--data DIR.*{make}"
    damaged(message, open_dataset, "no where", VOCAB)
    damaged(r"expected manifest\.json, shards named", open_dataset, tmp_path, VOCAB)
    manifests.save(manifests.Journal(2, ORIGIN), tmp_path)
    damaged("run the same prepare command again", open_dataset, tmp_path, VOCAB)


def test_a_journal_reads_back_as_written(tmp_path):
    extra = ExtraEntry("a.npy", "1" * 64)
    shard = ShardEntry("a.bin", 1, 1, 2, 3, 4, 0, "0" * 64, extra)
    split = manifests.SplitJournal((shard,), 3, 4, True)
    tokenizer = TokenizerEntry("t.model", "2" * 64, 5, 1)
    progress = manifests.Journal(2, ORIGIN, tokenizer, train=split)
    for value in (progress, dataclasses.replace(progress, tokenizer=None)):
        manifests.save(value, tmp_path)
        assert manifests.load_journal(tmp_path) == value
