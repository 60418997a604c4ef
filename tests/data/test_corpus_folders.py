"""Which files of a folder are text, against the rule in the words of docs/data.md."""

import gzip
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from sngpt_jax.data.corpus import documents, fingerprint, say_left_out
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset, open_shard, write_shard
from sngpt_jax.data.spec import PrepareSpec
from sngpt_jax.data.tokenizer import load_tokenizer
from tests.data.conftest import refuses

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.fixture
def folder(tmp_path):
    """A function that writes files, by name, below a folder, and returns the folder."""

    def write(files):
        for name, content in files.items():
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "texts"

    return write


def read(path):
    return list(documents(str(path)))


def test_every_kind_of_text_is_taken_in_the_order_of_the_names(folder):
    kinds = {"txt": "t", "md": "m", "py": "p", "jsonl": '{"text": "l"}', "json": '["j"]'}
    kinds |= {"csv": "text\nc\n", "TXT": "T"}
    files = {f"a.{kind}": text for kind, text in kinds.items()}
    files |= {f"b/a.{kind}.gz": gzip.compress(text.encode()) for kind, text in kinds.items()}
    # a.TXT, a.csv, a.json, a.jsonl, a.md, a.py, a.txt
    assert read(folder(files)) == list("Tcjlmpt") * 2


def test_names_that_begin_with_a_dot_are_skipped(folder):
    hidden = (".ipynb_checkpoints/a-checkpoint.txt", "b/._a.txt", ".a.jsonl", ".txt", "b/.git/a.py")
    assert read(folder({"a.txt": "yes"} | dict.fromkeys(hidden, "no"))) == ["yes"]


def test_files_of_other_kinds_are_counted_and_said(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sngpt_jax"), "propagate", True)
    others = ["0.png", "1.png", "2.png", "b/x.pdf", "b/y.pdf", "LICENSE", "a.parquet.gz", ".hidden"]
    root = folder({"a.txt": "text"} | dict.fromkeys(others, ""))
    say_left_out(str(root))
    kinds = r"7 files of other kinds: .png, .pdf, no ending, .gz"
    assert set(caplog.messages) == {f"{root}: left out {kinds}"}
    caplog.clear()
    for source in (str(root / "a.txt"), "stdlib", "hub:a/b"):
        say_left_out(source)
    assert not caplog.messages
    (root / "a.txt").unlink()
    refuses(f"{root}: no text; .*found {kinds}", read, root)


# ---------------------------------------- links


def test_linked_folders_are_followed_once_and_loops_end(folder, tmp_path):
    root = folder({"b/x.txt": "bx", "b/deep/y.txt": "by"})
    before = fingerprint(str(root))
    for name in "az":
        (root / name).symlink_to("b")  # other names for what is there
    (root / "b" / "loop").symlink_to(root)
    (root / "b" / "deep" / "up").symlink_to("..")
    assert read(root) == ["by", "bx"] and fingerprint(str(root)) == before
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "z.txt").write_text("oz")
    (outside / "back").symlink_to(root)
    (root / "c").symlink_to(outside)
    (root / "d.txt").symlink_to(outside / "z.txt")
    assert read(root) == ["by", "bx", "oz", "oz"]
    assert read(root / "c") == ["by", "bx", "oz", "oz"]  # a source may be a link itself


def test_folders_that_link_to_each_other_are_not_multiplied(folder):
    root = folder({"20/end.txt": "end"})
    for depth in range(20):  # 2^20 paths lead to the file
        (root / str(depth)).mkdir()
        for name in "ab":
            (root / str(depth) / name).symlink_to(root / str(depth + 1))
    assert read(root) == read(root / "0") == ["end"]


def test_what_cannot_be_read_ends_the_command_and_is_named(folder, monkeypatch):
    root = folder({"a.txt": "fine"})
    for name, target in (("b.txt", "gone.txt"), ("photo.png", "gone"), ("c", "c")):
        link = root / name
        link.symlink_to(target)
        refuses(f"^{link}: a link to {target}, which cannot be opened", read, root, kind=DataError)
        link.unlink()
    os.mkfifo(root / "pipe.txt")
    refuses(r"pipe\.txt: cannot be read: not a plain file", read, root, kind=DataError)
    (root / "pipe.txt").unlink()
    locked, access, listdir = root / "locked.txt", os.access, os.listdir
    locked.write_text("x" * 2000)
    with monkeypatch.context() as patch:  # the tests may run as root, who can read everything
        patch.setattr(os, "access", lambda path, mode: path != locked and access(path, mode))
        refuses(f"^{locked}: cannot be read; change its permissions", read, root, kind=DataError)
    (root / "sub").mkdir()

    def denied(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", denied)
    refuses(f"^{root / 'sub'}: cannot be read: Permission denied", read, root, kind=DataError)


def test_a_source_that_is_a_broken_link_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("gone.txt")
    refuses(r"a\.txt: cannot be read: No such file", read, tmp_path / "a.txt", kind=DataError)


def test_a_name_that_is_not_utf8_is_read_and_identified(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("coffee")
    assert read(tmp_path) == ["coffee"] and fingerprint(str(tmp_path)).startswith("files, 1 files")


# ---------------------------------------- pointers of Git LFS


@pytest.mark.parametrize("ending", [".txt", ".md.gz", ".jsonl.zst", ".json", ".csv", ".parquet"])
def test_a_pointer_is_refused_in_every_format(folder, ending):
    root = folder({"a.txt": "fine", f"b{ending}": POINTER})
    message = f"^{root}/b{ending}: a pointer of Git LFS in place of the file; .*: git lfs pull$"
    refuses(message, read, root, kind=DataError)
    refuses(message, fingerprint, str(root), kind=DataError)


# ---------------------------------------- a prepared folder


@pytest.fixture
def prepared(folder, tmp_path, tokenizer_file):
    text = folder({f"{i}.txt": f"the river and ü {i}" for i in range(4)})
    prepare(PrepareSpec(str(text), str(tmp_path / "out"), tokenizer=str(tokenizer_file)))
    return tmp_path / "out"


def test_a_pointer_in_place_of_a_shard_or_tokenizer_is_refused(prepared, tmp_path):
    names = {path.name for path in prepared.iterdir() if not path.name.startswith(".")}
    assert {"train_000000.bin.extra.npy", "tokenizer.model", "train_000000.bin"} <= names
    for name in names - {"manifest.json"}:
        path = prepared / name
        kept = path.read_bytes()
        path.write_text(POINTER)
        refuses(f"^{path}: a pointer of Git LFS", open_dataset, prepared, 90, kind=DataError)
        path.write_bytes(kept)
    open_dataset(prepared, 90)
    for name, opened in (
        ("a.json", load_tokenizer),
        ("a.model", load_tokenizer),
        ("a", open_shard),
    ):
        (tmp_path / name).write_text(POINTER)
        refuses(f"/{name}: a pointer of Git LFS", opened, tmp_path / name)


def test_names_that_begin_with_a_dot_are_no_shards_and_no_tokenizers(tmp_path, tokenizer_file):
    for split in ("train", "val"):
        write_shard(tmp_path / f"a_{split}_0.bin", np.ones(9, np.uint16))
        (tmp_path / f"._a_{split}_0.bin").write_bytes(b"\0\5\26\7Mac OS X")
    shutil.copy(tokenizer_file, tmp_path / "t.model")
    (tmp_path / "._t.model").write_bytes(b"\0\5\26\7Mac OS X")
    data = open_dataset(tmp_path, 90)
    assert len(data.train) == len(data.val) == 9 and data.tokenizer.path.name == "t.model"
