"""Sources of text, with stand-ins for the network."""

import gzip
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.corpus import count_parts, documents, fingerprint, formats, reading, sources
from sngpt_jax.data.manifest import DataError
from tests.data.conftest import refuses

WRAP = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def fails(source, expected, kind=DataError):
    refuses(expected, lambda: list(documents(str(source))), kind=kind)


# ---------------------------------------- the standard library


def test_stdlib_is_the_librarys_own_text_in_hash_order():
    found = list(documents("stdlib"))
    assert found == list(documents("stdlib"))
    assert len(found) > 300 and sum(map(len, found)) > 5_000_000 and all(found)
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("test/test_ast.py", "test/support/__init__.py"):
        if (root / name).is_file():
            assert (root / name).read_text(encoding="utf-8") not in found

    names = ["json/decoder.py", "this.py", "ast.py", "email/message.py", "asyncio/base_events.py"]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    places = [found.index((root / name).read_text(encoding="utf-8")) for name in names]
    assert places == sorted(places)


def test_stdlib_skips_tests_and_what_cannot_be_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for name in ("test", "x/tests", "idle_test", "site-packages/p", "config-3.11", "x/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.py").write_text("no = 1\n")
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "cookie.py").write_bytes(b"# coding: nothing\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "data.txt").write_text("no")
    (tmp_path / "x" / "bom.py").write_bytes(b"\xef\xbb\xbfy = 1\r\n")
    assert sorted(documents("stdlib")) == ["# coding: latin-1\nx = 'é'\n", "y = 1\n"]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "x" / "tests"))
    (tmp_path / "x" / "tests" / "a.py").unlink()
    fails("stdlib", "no .py files", kind=UserError)


# ---------------------------------------- files


@pytest.mark.parametrize("ending", WRAP)
def test_txt(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    end = b"<|endoftext|>"
    texts = (b"\xef\xbb\xbf", b"\nfirst\n\n  line\r\n", b"\r\n", b"\nnot <|endoftext|>\nlast")
    path.write_bytes(WRAP[ending](end.join(texts)))
    assert list(documents(str(path))) == ["first\n\n  line\r\n", "not <|endoftext|>\nlast"]


@pytest.mark.parametrize("ending", WRAP)
def test_jsonl(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    text = """{"text": "one\\n", "id": 3}

{"text": "\\ud800x\\ud83d\\ude00"}
{"text": ""}
{"url": {}, "text": "é"}"""
    path.write_bytes(WRAP[ending](text.encode()))
    assert list(documents(str(path))) == ["one\n", "\ufffdx😀", "é"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_many_members_and_frames(tmp_path, ending):
    texts = [f"document {i} " + "x" * i for i in range(500)]
    whole = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    parts = (whole[:70_001], b"", whole[70_001:])  # cut inside a line
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(map(WRAP[ending], parts)))
    assert list(documents(str(path))) == texts


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_compression(tmp_path, ending):
    whole = WRAP[ending](b"".join(b'{"text": "%d"}\n' % i for i in range(5000)))
    path = tmp_path / f"a.jsonl{ending}"
    for content in (b"", whole[:1], whole[:10], whole[:-1], whole[:-12], whole + whole[:-5]):
        path.write_bytes(content)
        fails(path, f"{path}.*cannot be read: ")


def with_window(content, log):
    """A zstd frame of a stored block, made by hand, whose header asks for a window of 2^log."""
    block = (len(content) << 3 | 1).to_bytes(3, "little") + content
    return bytes.fromhex("28b52ffd00") + bytes([log - 10 << 3]) + block


def test_zstd_with_a_long_window_says_its_memory(tmp_path, caplog):
    caplog.set_level("INFO", logger="sngpt_jax")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(with_window(b"some text", 27))
    assert list(documents(str(path))) == ["some text"] and not caplog.messages
    path.write_bytes(with_window(b"some text", 30))
    assert list(documents(str(path))) == ["some text"]
    assert caplog.messages == [f"{path}: its zstd window takes 1.00 GiB of memory"]
    path.write_bytes(with_window(b"some text", 32))
    fails(
        path, f"{path}:1: cannot be read.*too much memory.*; compress it again with zstd --long=31"
    )


def test_a_zstd_window_beyond_the_memory_says_so(tmp_path, monkeypatch):
    def refuse(data):
        raise zstandard.ZstdError("zstd decompressor error: Allocation error : not enough memory")

    frame = SimpleNamespace(decompress=refuse)
    decompressor = SimpleNamespace(decompressobj=lambda: frame)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda max_window_size: decompressor)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(with_window(b"some text", 30))
    said = f"{path}: its zstd window takes 1.00 GiB of memory"
    with pytest.raises(MemoryError, match=said):
        list(documents(str(path)))


def test_damaged_compression(tmp_path):
    data, path = bytearray(gzip.compress(os.urandom(50_000).hex().encode())), tmp_path / "a.txt.gz"
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    fails(path, f"{path}.*cannot be read: ")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": ', "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON: more than 64 levels"),
        (b"[1]", "expected a string under the key 'text', found list in place of"),
        (b'{"txt": "a", "id": 1}', "found the keys 'txt', 'id'"),
        (b'{"text": null}', "found NoneType there"),
        (b'{"text": 3}', "found int there"),
        (b'{"text": "\xff"}', "codec can't decode byte 0xff"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    fails(path, f"{path}:3.*{expected}")
    assert next(documents(str(path))) == "fine"  # lines before the bad one are read


def test_txt_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nbad \xe9\n")
    fails(path, f"{path}:2.*codec can't decode byte 0xe9")


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"document {i}" for i in range(1000)]
    for kind in (pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"id": list(range(1000)), "text": pyarrow.array(texts, kind)})
        parquet.write_table(table, path, row_group_size=300)
        assert list(documents(str(path))) == texts
    content = map(pyarrow.py_buffer, (np.array([0, 1, 2], "<i4"), b"a\xff"))
    raw = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, *content])
    for columns, message in (
        ({"text": ["a", None]}, ": row 2.*found NoneType"),
        ({"text": [1, 2]}, ": row 1.*found int"),
        (
            {"content": ["a"], "id": [1]},
            ": no column 'text'; columns: 'content', 'id'; name one with",
        ),
        ({"text": raw}, ": row 2.*codec can't decode byte 0xff"),
    ):
        parquet.write_table(pyarrow.table(columns), path)
        fails(path, f"{path}{message}")
    parquet.write_table(pyarrow.table({"text": texts}), path)
    path.write_bytes(path.read_bytes()[:-20])
    fails(path, f"{path}: row 0: cannot be read: ArrowInvalid")


def test_folder_in_sorted_order(tmp_path):
    files = {"b.txt": "b", "a/z.jsonl": '{"text": "az"}', "a.txt": "a", "note.rst": "no"}
    for name, text in (files | {"a/deep/c.txt": "adc"}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(documents(str(tmp_path))) == ["a", "adc", "az", "b"]


def test_sources_that_are_not_there(tmp_path):
    for source in ("nonsense", str(tmp_path / "absent.txt"), ""):
        with pytest.raises(UserError, match="no such file or folder; a source is stdlib, hub:NAME"):
            documents(source)  # at the call, before anything is read
    (tmp_path / "a.rst").write_text("x")
    fails(
        tmp_path,
        r"no text; expected files ending in \.txt.*; found 1 file of other kinds: \.rst",
        kind=UserError,
    )
    fails(tmp_path / "a.rst", "expected a file ending in .txt", kind=UserError)


def test_fingerprint_follows_content_not_place_or_time(tmp_path):
    assert platform.python_version() in fingerprint("stdlib")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "a.txt").write_text("abc")
        (folder / "note.rst").write_text(folder.name)
    first = fingerprint(str(one))
    os.utime(one / "a.txt", (1, 1))
    assert first == fingerprint(str(one)) == fingerprint(str(two))
    (one / "a.txt").write_text("abd")  # of the same size
    (two / "a.txt").rename(two / "b.txt")
    assert len({first, fingerprint(str(one)), fingerprint(str(two))}) == 3
    assert fingerprint("hub:a/b") == fingerprint("hub:a/b@train") != fingerprint("hub:a/b:c@train")


def test_fingerprint_of_a_large_text_follows_names_sizes_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_HASHED_BYTES", 6)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("abc")
        os.utime(tmp_path / name, (1, 1))
    monkeypatch.setattr(sources, "file_sha256", lambda path, error: pytest.fail("read the text"))
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first
    os.utime(tmp_path / "b.txt", ns=(1, 2))
    assert fingerprint(str(tmp_path)) != first


# ---------------------------------------- in parts


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_one_after_the_other_are_the_source(tmp_path, parts):
    for number in range(7):
        lines = [json.dumps({"text": f"{number} {line}"}) for line in range(number % 3)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    assert count_parts(str(tmp_path)) == 7
    read = [list(documents(str(tmp_path), part, parts)) for part in range(parts)]
    whole = [f"{number} {line}" for number in range(7) for line in range(number % 3)]
    assert list(itertools.chain(*read)) == list(documents(str(tmp_path))) == whole
    files = [{text.split()[0] for text in part} for part in read]
    assert sum(map(len, files)) == len(set().union(*files))  # no file is in two parts
    if parts == 7:
        assert [len(part) for part in read] == [number % 3 for number in range(7)]


def test_the_library_has_as_many_parts_as_a_cluster_takes_tasks(monkeypatch):
    count = count_parts("stdlib")
    assert 100 < count <= sources.MAX_PARTS
    monkeypatch.setattr(sources, "MAX_PARTS", 50)
    assert count_parts("stdlib") == 50


def test_a_data_sets_files_are_its_parts(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows(files):
        for file in files:
            yield from ({"text": f"{file} {row}"} for row in range(3))

    def load_dataset(*args, **kwargs):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": list("abcde")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert count_parts("hub:some/set") == 5
    whole = list(documents("hub:some/set"))
    assert whole == [f"{file} {row}" for file in "abcde" for row in range(3)]
    for parts in (2, 5):
        read = [documents("hub:some/set", part, parts) for part in range(parts)]
        assert list(itertools.chain(*read)) == whole
    assert list(documents("hub:some/set", 3, 5)) == ["d 0", "d 1", "d 2"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: 1 / 0)
    message = "source hub:some/set: the data set's files cannot be listed: ZeroDivisionError"
    refuses(message, count_parts, "hub:some/set", kind=DataError)


# ---------------------------------------- Hugging Face


def stand_in(monkeypatch, **functions):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(**functions))


def test_hub_streams_the_text_column(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "one", "url": "u"}, {"text": ""}, {"text": "two\ud800"}])

    stand_in(monkeypatch, load_dataset=load_dataset)
    assert list(documents("hub:HuggingFaceFW/fineweb-edu:sample-10BT@test")) == ["one", "two\ufffd"]
    assert list(documents("hub:some/set")) == ["one", "two\ufffd"]
    assert calls == [
        (("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "test", "streaming": True}),
        (("some/set", None), {"split": "train", "streaming": True}),
    ]


def test_hub_failures_are_one_line(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("no\nroute")

    found = [{"text": "a"}, {"content": "b"}]
    for load, message in (
        (rows, "hub:some/set.*after row 1.*ConnectionError: no route"),
        (lambda: 1 / 0, "after row 0"),
        (lambda: found, "hub:some/set: row 2.*found the keys 'content'"),
    ):
        stand_in(monkeypatch, load_dataset=lambda *a, load=load, **k: load())
        fails("hub:some/set", message)
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    fails("hub:some/set", f"{sys.executable} -m pip install datasets", kind=UserError)
    for bad in ("hub:", "hub::c", "hub:a:b:c", "hub:a@"):
        fails(bad, "expected hub:NAME", kind=UserError)


@pytest.mark.parametrize(
    ("name", "ending", "text"),
    [("a.txt", ".zst", "x" * 1001), ("a.jsonl", ".gz", "x" * 1001), ("a.txt", "", "xyz\n" * 251)],
)
def test_a_document_that_a_file_unpacks_to_has_a_limit(tmp_path, monkeypatch, name, ending, text):
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(formats, "MAX_ROW", 1000)
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(WRAP[ending](text.encode()))
    fails(path, rf"{path}:1: a (document|line) of more than")
    if not ending:
        path.write_text(f"{'xyz' * 300}\n<|endoftext|>\n" * 3)
        assert len(list(documents(str(path)))) == 3
        path.write_text(f"{'x' * 1001}<|endoftext|>\n<|endoftext|>\nnext")
        fails(path, rf"{path}:1: a document of more than")


def test_the_hubs_retries_are_not_shown():
    pytest.importorskip("huggingface_hub")
    program = """
import logging
from sngpt_jax.data import corpus, golf
corpus.imported("huggingface_hub", "a test").hf_hub_download
logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
"""
    command = [sys.executable, "-c", program]
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_VERBOSITY"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
