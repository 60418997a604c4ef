"""The published token shards, with a local stand-in for the network."""

import json
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from sngpt_jax.data import golf
from sngpt_jax.data.shards import unfinished
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from tests.data.conftest import refuses

SHARDS = "datasets/datasets/fineweb10B_sp280/fineweb"


def shard(tokens):
    """The published format, written out by hand."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A stand-in of the data set: {path in the repository: content}, and what was fetched."""
    text, path = ["some text of words, " * 20], tmp_path / "made.model"
    model = train_sentencepiece(text, path, vocab_size=280, normalization="nmt_nfkc")
    stats = {"files_train": 3, "files_val": 2}
    sets = [
        {"name": f"fineweb10B_{name}", "tokenizer_name": tokenizer, "stats": stats}
        for name, tokenizer in (("byte260", "bytes"), ("sp280", "sp_bpe_280"))
    ]
    models = [
        {"name": "bytes", "path": "tokenizers/b.json"},
        {"name": "sp_bpe_280", "model_path": "tokenizers/fineweb_280_bpe.model"},
    ]
    manifest = {"datasets": sets, "tokenizers": models}
    files = {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        "datasets/tokenizers/fineweb_280_bpe.model": model.path.read_bytes(),
    }
    for split, count in (("train", 3), ("val", 2)):
        for n in range(count):
            files[f"{SHARDS}_{split}_{n:06d}.bin"] = shard([1, 5 + n, len(split)])
    fetched = []

    def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
        assert (repo_id, repo_type) == ("willdepueoai/parameter-golf", "dataset")
        fetched.append(filename)
        if filename not in files:
            raise FileNotFoundError(f"404\n{filename}")
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files[filename])
        return str(target)

    hub = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return files, fetched


def test_download_golf(tmp_path, published):
    (files, fetched), out = published, tmp_path / "out"
    golf.download(out, vocab_size=280, train_shards=2)
    names = ["train_000000.bin", "train_000001.bin", "val_000000.bin", "val_000001.bin"]
    expected = ["fineweb_280_bpe.model", *(f"fineweb_{name}" for name in names)]
    assert sorted(path.name for path in out.iterdir()) == expected
    for name, content in files.items():
        if (out / Path(name).name).exists():
            assert (out / Path(name).name).read_bytes() == content

    fetched.clear()  # whole files stay; others are fetched again
    whole = out / "fineweb_train_000001.bin"
    whole.write_bytes(whole.read_bytes()[:-1])
    golf.download(out, vocab_size=280, train_shards=3)
    again = ["manifest.json", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert [Path(name).name for name in fetched] == again
    assert whole.read_bytes() == shard([1, 6, 5])


def golf_fails(out, expected, vocab_size=280, train_shards=1):
    download = partial(golf.download, vocab_size=vocab_size, train_shards=train_shards)
    refuses(expected, download, out)


def test_download_golf_failures_are_one_line(tmp_path, published, monkeypatch):
    (files, _), out = published, tmp_path / "out"
    known = "no fineweb10B_sp999; it has fineweb10B_byte260, fineweb10B_sp280"
    golf_fails(out, known, vocab_size=999)
    golf_fails(out, "fineweb10B_sp280 has 3 training shards; asked for 4", train_shards=4)
    name = f"{SHARDS}_val_000001.bin"
    missing = files.pop(name)
    golf_fails(out, f"{name} cannot be fetched.*404")
    assert (out / "fineweb_val_000000.bin").exists()  # kept for the next try
    files[name] = missing[:-2]
    golf_fails(out, "fineweb_val_000001.bin.*truncated")
    assert not (out / "fineweb_val_000001.bin").exists()

    other = tmp_path / "other"
    other.mkdir()
    (other / "fineweb_1024_bpe.model").write_bytes(b"")
    golf_fails(other, "holds fineweb_1024_bpe.model.*another folder")

    manifest = json.loads(files["datasets/manifest.json"])
    manifest["tokenizers"][1]["model_path"] = "../../evil.model"
    files["datasets/manifest.json"] = json.dumps(manifest).encode()
    golf_fails(tmp_path / "new", "no path below its folder")
    lacking = b'{"datasets": [{"name": "fineweb10B_sp280"}], "tokenizers": []}'
    for content in (b"no json", b"[]", lacking):
        files["datasets/manifest.json"] = content
        golf_fails(tmp_path / "new", "manifest.json.*not the layout")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    install = f"{golf.REPO}.*{sys.executable} -m pip install huggingface_hub"
    golf_fails(tmp_path / "new", install)


def test_download_golf_marks_the_folder_while_it_is_not_whole(tmp_path, published):
    (files, _), out = published, tmp_path / "out"
    golf_fails(out, "asked for 9", train_shards=9)
    assert not out.exists()  # nothing was begun
    missing = files.pop(f"{SHARDS}_train_000001.bin")
    golf_fails(out, "fineweb_train_000001.bin cannot be fetched", train_shards=2)
    assert unfinished(out) and (out / "fineweb_train_000000.bin").exists()
    files[f"{SHARDS}_train_000001.bin"] = missing
    golf.download(out, vocab_size=280, train_shards=2)
    assert not unfinished(out)
    manifest = files.pop("datasets/manifest.json")
    golf_fails(out, "manifest.json cannot be fetched", train_shards=3)  # as without a network
    assert manifest and not unfinished(out)
