"""Documents in training and in validation: found by their tokens, and left out of training."""

import gzip
import json
import logging
import shutil
from dataclasses import asdict, replace
from hashlib import blake2b
from itertools import groupby

import numpy as np
import pytest

from sngpt_jax.data import overlap
from sngpt_jax.data.manifest import load_manifest
from sngpt_jax.data.overlap import (
    common,
    document_hash,
    document_hashes,
    refuse_trained_data,
    refuse_trained_text,
    split_hashes,
)
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset, write_shard
from sngpt_jax.data.spec import PrepareSpec
from sngpt_jax.data.split import draw
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.prepare import main
from tests.data.conftest import damaged, refuses, stream_of, write_jsonl

BOS = 1


def reference(tokens):
    """The hashes of the runs of tokens that are no BOS."""
    runs = [list(run) for is_bos, run in groupby(tokens, lambda token: token == BOS) if not is_bos]
    contents = [b"".join(int(token).to_bytes(2, "little") for token in run) for run in runs]
    return [int.from_bytes(blake2b(x, digest_size=8).digest(), "little") for x in contents]


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_hashes_are_of_the_tokens_between_two_bos(monkeypatch, block):
    monkeypatch.setattr(overlap, "_BLOCK", block)
    rng = np.random.default_rng(block)
    pieces = [rng.integers(0, 6, size).astype(np.uint16) * 9999 % 65521 for size in (50, 1, 200)]
    for tokens in pieces:
        tokens[rng.random(len(tokens)) < 0.3] = BOS  # also two in a row, and at the ends
    found = document_hashes(stream_of(*pieces), BOS)
    assert found.tolist() == reference(np.concatenate(pieces))
    assert document_hash(np.array([2, 65535])).tolist() == reference([2, 65535])[0]


def test_common_counts_documents():
    first, other = np.array([5, 5, 7, 2**64 - 1, 9], np.uint64), np.array([2**64 - 1, 5], np.uint64)
    assert (common(first, other), common(other, first), common(first, first[:0])) == (3, 2, 0)


# ---------------------------------------- preparations


@pytest.fixture
def prepared(tmp_path, tokenizer_file):
    """A function that prepares a source, and returns the manifest and each split's documents."""

    def documents(stream):
        tokens = stream.take(0, len(stream)).tolist()
        return [tuple(run) for is_bos, run in groupby(tokens, lambda x: x == BOS) if not is_bos]

    def made(source, name="out", **changes):
        usual = {"tokenizer": str(tokenizer_file), "shard_tokens": 300}
        manifest = prepare(PrepareSpec(str(source), str(tmp_path / name), **usual | changes))
        data = open_dataset(tmp_path / name, 90)
        for split in ("train", "val"):
            kept = split_hashes(data, split)
            computed = document_hashes(getattr(data, split), BOS)
            np.testing.assert_array_equal(kept, computed)
            bare = replace(data, manifest=replace(manifest, separation=None))
            np.testing.assert_array_equal(split_hashes(bare, split), computed)
        return manifest, documents(data.train), documents(data.val)

    return made


@pytest.fixture
def texts(tmp_path):
    """A folder of text: a file, its copy, its compressed copy, and another file."""
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", 40)
    content = (folder / "a.jsonl").read_bytes()
    (folder / "b.jsonl").write_bytes(content)
    with gzip.open(folder / "c.jsonl.gz", "wb") as file:
        file.write(content)
    write_jsonl(folder / "d.jsonl", 40, seed=1)
    return folder


def encoded(tokenizer_file, *files):
    tokenizer = load_tokenizer(tokenizer_file)
    unpack = {".gz": gzip.decompress}
    contents = [unpack.get(file.suffix, bytes)(file.read_bytes()) for file in files]
    lines = b"".join(contents).splitlines()
    return [tuple(tokenizer.encode(json.loads(line)["text"])) for line in lines]


@pytest.mark.parametrize("rule", ["first", "drawn", "own"])
def test_what_validation_has_is_left_out_of_training(prepared, texts, tokenizer_file, rule):
    options = {"first": {"val_docs": 30}, "drawn": {"split_seed": 5}}
    options["own"] = {"val_source": str(texts / "d.jsonl")}
    manifest, train, val = prepared(texts, **options[rule])
    every = encoded(tokenizer_file, *sorted(texts.iterdir()))
    held_out = {"first": range(30), "drawn": [n for n in range(160) if draw(5, n) < 0.1], "own": ()}
    expected = [every[n] for n in held_out[rule]] or encoded(tokenizer_file, texts / "d.jsonl")
    others = [document for n, document in enumerate(every) if n not in held_out[rule]]
    assert val == expected
    assert train == [document for document in others if document not in val]
    assert manifest.separation.dropped == len(others) - len(train) >= 20

    kept, train, val = prepared(texts, "kept", allow_overlap=True, **options[rule])
    assert (train, val, kept.separation.dropped) == (others, expected, 0)


def test_a_limit_is_of_the_tokens_that_are_kept(prepared, texts):
    _, train, _ = prepared(texts, val_docs=30)
    manifest, limited, _ = prepared(texts, "limited", val_docs=30, max_tokens=700)
    assert sum(entry.tokens for entry in manifest.train) == 700
    assert limited[:-1] == train[: len(limited) - 1] and 0 < len(limited) < len(train)


def test_prepare_says_what_it_did(prepared, texts, tmp_path, tokenizer_file, capsys):
    options = ["--tokenizer", str(tokenizer_file), "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(["--source", str(texts), "--val-docs", "30", *options]) == 0
    said = capsys.readouterr().out
    assert "the first 30 documents are held out" in said
    assert "left out    60 training documents that validation has, too" in said
    assert main(["--verify", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == 60
    options[-1] = str(tmp_path / "one")
    (tmp_path / "one.txt").write_text("the river and the stone\n" * 200)
    assert main(["--source", str(tmp_path / "one.txt"), *options]) == 0
    said = capsys.readouterr().out
    assert "after 4,320 characters" in said and "left out" not in said


def test_training_text_that_validation_has_whole_is_refused(prepared, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", 1)
    (tmp_path / "twice.jsonl").write_text((tmp_path / "a.jsonl").read_text() * 2)
    refuses("has all its training documents, too", prepared, tmp_path / "twice.jsonl")


def test_a_tokenizer_is_not_learnt_from_what_training_leaves_out(tmp_path):
    rows = [*["zzzz qqqq zzzz qqqq"] * 30, *[f"the river and the stone {n}" for n in range(60)]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    learnt = {"vocab_size": 300, "normalization": "identity", "val_docs": 3}
    lengths = []
    for allow_overlap in (False, True):
        out = tmp_path / str(allow_overlap)
        spec = PrepareSpec(str(tmp_path / "a.jsonl"), str(out), **learnt)
        prepare(replace(spec, allow_overlap=allow_overlap))
        lengths.append(len(load_tokenizer(out / "tokenizer.model").encode(rows[0])))
    assert lengths[0] == len(rows[0]) > lengths[1]


# ---------------------------------------- folders


def test_damaged_hashes_are_named(prepared, texts, tmp_path):
    prepared(texts)
    data, path = open_dataset(tmp_path / "out", 90), tmp_path / "out" / "val.hashes.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    damaged(r"val\.hashes\.npy: expected SHA-256", split_hashes, data, "val")
    damaged(r"val\.hashes\.npy: expected SHA-256", main, ["--verify", str(tmp_path / "out")])


def test_a_folder_of_an_earlier_version_is_found(prepared, texts, tmp_path):
    """It has no hashes, and its origin lacks the fields of the split."""
    _, *splits = prepared(texts, val_docs=30, allow_overlap=True)
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    del values["separation"]
    for name in ("val_fraction", "split_seed", "allow_overlap"):
        del values["origin"][name]
    path.write_text(json.dumps(values))
    again, *found = prepared(texts, val_docs=30)
    assert found == splits and again.separation is None
    assert asdict(again) == asdict(load_manifest(tmp_path / "out"))
    refuses("val_docs: 30 there, 0 asked for", prepared, texts)


def test_what_cannot_be_compared_is_said(prepared, texts, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sngpt_jax"), "propagate", True)
    prepared(texts)
    data, other = open_dataset(tmp_path / "out", 90), tmp_path / "other"
    prepared(texts, "other")
    caplog.clear()  # what the preparations say
    refuse_trained_data(data, tmp_path / "out")
    assert not caplog.records
    for change, message in (
        (lambda: (other / "train_000000.bin").unlink(), "train_000000.bin: missing"),
        (lambda: shutil.rmtree(other), f"{other} is gone"),
    ):
        change()
        refuse_trained_data(data, other)
        assert message in caplog.records[-1].getMessage()
    hashes = split_hashes(data, "train")
    refuse_trained_text(hashes, "x", tmp_path / "out", "0" * 64)
    assert "tokens of another tokenizer" in caplog.records[-1].getMessage()
    message = rf"^x: the model was trained on {len(hashes)} of its {len(hashes)} documents"
    refuses(message, refuse_trained_text, hashes, "x", tmp_path / "out", data.tokenizer.sha256)


def test_parts_of_one_document_are_the_same_text(tmp_path, tokenizer_file):
    text, other = tmp_path / "one.txt", tmp_path / "other.txt"
    text.write_text("".join(f"line {i} of it\n" for i in range(200)))
    other.write_text("another line\n" * 50)

    def folder(name, source=text, **changes):
        where = tmp_path / name
        prepare(PrepareSpec(str(source), str(where), tokenizer=str(tokenizer_file), **changes))
        return where

    most, half = folder("most"), folder("half", val_fraction=0.5)
    whole, scored = folder("whole", val_source=str(other)), folder("s", other, val_source=str(text))
    for data, trained in ((half, most), (most, whole), (scored, most), (scored, half)):
        message = "the model was trained on a part of the same document"
        refuses(message, refuse_trained_data, open_dataset(data, 90), trained)
    for data, trained in ((most, half), (whole, most)):
        refuse_trained_data(open_dataset(data, 90), trained)


def test_a_shard_of_both_splits_is_refused(tmp_path, tokenizer_file):
    for name in ("a_train_0", "a_val_0", "a_train_val_0"):
        write_shard(tmp_path / f"{name}.bin", np.ones(9, np.uint16))
    (tmp_path / "t.model").write_bytes(tokenizer_file.read_bytes())
    damaged(r"a_train_val_0\.bin: its name is that of a training and", open_dataset, tmp_path, 90)
    (tmp_path / "a_train_val_0.bin").unlink()
    assert len(open_dataset(tmp_path, 90).train) == 9
