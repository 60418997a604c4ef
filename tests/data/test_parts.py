"""Parts of a source, encoded apart, are the source's documents in their order."""

from dataclasses import replace

import numpy as np
import pytest

from sngpt_jax.data import parts as module
from sngpt_jax.data.manifest import Origin, ShardEntry, SplitJournal, load_journal, save
from sngpt_jax.data.parts import Parts
from sngpt_jax.data.tokenizer import load_tokenizer
from tests.data.conftest import damaged, refuses, write_jsonl

SIZES = [40, 1, 25, 0, 33]  # documents in each file


@pytest.fixture
def texts(tmp_path):
    """The source's documents, one list per file."""
    (tmp_path / "text").mkdir()
    return [
        write_jsonl(tmp_path / "text" / f"{number}.jsonl", size, seed=number, longest=30)
        for number, size in enumerate(SIZES)
    ]


@pytest.fixture
def parts(tmp_path, texts, tokenizer_file, monkeypatch):
    # several shards per part, and documents across their edges
    monkeypatch.setattr(module, "_SHARD_TOKENS", 400)
    monkeypatch.setattr(module, "_CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr("sngpt_jax.data.encode._CHUNK_CHARACTERS", 500)
    tokenizer = load_tokenizer(tokenizer_file)
    origin = Origin("files", "", 30, f"sha256:{tokenizer.sha256}", tokenizer.vocab_size, "", 500, 0)
    which = (origin, tokenizer_file, tokenizer.entry())
    return Parts(tmp_path / "parts", str(tmp_path / "text"), len(SIZES), *which)


def encode_all(parts):
    for part in range(parts.count):
        parts.encode(part)


def check_read(parts, texts, first=0):
    tokenizer = load_tokenizer(parts.tokenizer)
    expected = [tokenizer.encode_document(text) for part in texts for text in part][first:]
    found = [document for chunk in parts.read(first) for document in chunk]
    assert len(found) == len(expected)
    for document, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(document.tokens, other.tokens)
        np.testing.assert_array_equal(document.corrections, other.corrections)
        assert document.bytes == other.bytes
    return expected


@pytest.mark.slow
def test_parts_encoded_in_any_order_read_as_the_source(parts, texts):
    for part in (3, 0, 4, 1, 2):
        assert part in parts.left()
        parts.encode(part)
    assert parts.left() == []
    expected = check_read(parts, texts)
    assert sum(document.lossy for document in expected) > 0
    assert len(parts.reached(0).shards) > 2
    for first in (1, 39, 40, 41, 42, 66, 98, 99):
        check_read(parts, texts, first)


def test_fewer_parts_than_files_are_runs_of_whole_files(parts, texts):
    two = replace(parts, count=2)
    encode_all(two)
    assert two.reached(0).documents == sum(SIZES[:2]) and two.reached(1).documents == sum(SIZES[2:])
    check_read(two, texts)


def test_a_part_that_was_stopped_is_gone_on_with_where_it_was(parts, texts, monkeypatch):
    saved = module.save

    def stopped(progress, folder):
        saved(progress, folder)
        if len(progress.train.shards) == 2 and not progress.train.finished:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "save", stopped)
        parts.encode(0)
    kept = {path: path.stat().st_mtime_ns for path in parts.folder(0).glob("train_*")}
    assert len(kept) >= 2 and parts.left() == [0, 1, 2, 3, 4]
    encode_all(parts)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    check_read(parts, texts)
    times = {path: path.stat().st_mtime_ns for path in parts.directory.rglob("train_*")}
    parts.encode(0)
    assert times == {path: path.stat().st_mtime_ns for path in parts.directory.rglob("train_*")}


def test_no_more_parts_are_encoded_than_hold_the_tokens_asked_for(parts, texts):
    encode = load_tokenizer(parts.tokenizer).encode
    lengths = [[1 + len(encode(text)) for text in part] for part in texts]
    some = replace(parts, origin=replace(parts.origin, max_tokens=100))
    encode_all(some)
    encoded = [some.reached(part).documents for part in range(len(SIZES))]
    assert some.left() == [] and encoded[-1] == 0
    assert not (some.folder(4) / "train_000000.bin").exists()
    total = sum(sum(part[:count]) for part, count in zip(lengths, encoded, strict=True))
    needed = sum(lengths[0][:30]) + 100  # the held-out documents are all in part 0
    assert needed <= total <= needed + 3 * 400 + max(map(max, filter(None, lengths))) * 8


def test_a_part_stops_where_those_before_it_that_ran_meanwhile_hold_enough(
    parts, texts, monkeypatch
):
    some = replace(parts, origin=replace(parts.origin, max_tokens=100))
    saved = module.save

    def meanwhile(progress, folder):
        saved(progress, folder)
        if folder == some.folder(2) and len(progress.train.shards) == 1:
            for earlier in (0, 1):
                assert not some.reached(earlier).finished
                some.encode(earlier)

    monkeypatch.setattr(module, "save", meanwhile)
    some.encode(2)
    assert not some.reached(2).finished and 0 < some.reached(2).documents < SIZES[2]
    assert some.left() == []
    encode = load_tokenizer(parts.tokenizer).encode_document
    expected = [token for text in texts[0][30:] for token in encode(text).tokens]
    found = [token for document in next(some.read(30)) for token in document.tokens.tolist()]
    assert len(found) >= 100 and found == expected[: len(found)]


@pytest.mark.parametrize("held_out", [0, 1, 3, 8])
def test_tokens_are_only_counted_where_they_are_certain_to_be_training_tokens(parts, held_out):
    rng = np.random.default_rng(held_out)
    for _ in range(200):
        # of a stream of 200 tokens in shards of 20: where documents begin
        begins = rng.random(200) < 0.1
        begins[0] = True
        document = np.cumsum(begins)
        entries = [
            ShardEntry("s", 20, int(begins[at : at + 20].sum()), 0, 0, 0, 0, "", None)
            for at in range(0, 200, 20)
        ]
        training = int((document > held_out).sum())
        asked = int(rng.integers(1, 200))
        some = replace(parts, origin=replace(parts.origin, val_docs=held_out, max_tokens=asked))
        assert not some._enough([SplitJournal(tuple(entries))]) or training >= asked
        assert some._enough([SplitJournal(tuple(entries))]) or training - 2 * 20 < asked


def test_damaged_parts_are_named(parts):
    encode_all(parts)
    path = parts.folder(2) / "train_000001.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    pattern = r"00002-of-00005/train_000001\.bin: expected SHA-256 .*; delete .*00002-of-00005 and"
    damaged(pattern, list, parts.read(0))
    path.write_bytes(whole)
    sidecar = parts.folder(2) / parts.reached(2).shards[0].extra.name
    content = sidecar.read_bytes()
    sidecar.write_bytes(content[:-1] + b"x")
    damaged(r"extra\.npy: expected SHA-256", list, parts.read(0))
    sidecar.unlink()
    damaged(r"extra\.npy: expected .* found no file; delete", list, parts.read(0))
    sidecar.write_bytes(content)
    journal = load_journal(parts.folder(2))
    for count in (24, 26):
        save(replace(journal, train=replace(journal.train, documents=count)), parts.folder(2))
        damaged(f"00005: expected {count} documents, found 25; delete", list, parts.read(0))


def test_parts_of_another_preparation_are_refused(parts, tmp_path):
    parts.encode(0)
    other = replace(parts, origin=replace(parts.origin, normalization="identity"))
    for attempt in (lambda: other.encode(0), other.left, lambda: next(other.read(0))):
        refuses("normalization: '' there, 'identity' asked for", attempt)
    changed = tmp_path / "changed.model"
    changed.write_bytes(parts.tokenizer.read_bytes() + b"\n")
    refuses(r"changed\.model", replace(parts, tokenizer=changed).encode, 1)
