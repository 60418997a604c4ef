"""Documents of files by format: where text is cut, what a key names, and the memory it takes."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
import tracemalloc

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sngpt_jax.data.corpus import Reading, check_reading, documents, formats
from sngpt_jax.data.corpus import reading as bounds
from sngpt_jax.data.manifest import DataError, load_manifest
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.spec import PrepareSpec, command_line
from tests.data.conftest import refuses

MIB = 2**20


def read(path, **reading):
    return list(documents(str(path), reading=Reading(**reading)))


def fails(path, expected, **reading):
    refuses(expected, lambda: read(path, **reading), kind=DataError)


# ---------------------------------------- text

PIECES = ["a", "\n", "\r\n", "é", "--", "-", "<|endoftext|>", "\n<|endoftext|>\n", "\n--\n", "--\r"]


def cut_whole(text, split_on):
    """The documents by the words of docs/data.md, from the whole text at once."""
    mark = re.escape(split_on or "<|endoftext|>")
    filled = rf"(?<![^\n]){mark}(?:\r?\n|\r?\Z)"
    if split_on.endswith("\n"):
        return re.split(mark, text)
    return re.split(f"{filled}|{mark}" if split_on else filled, text)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.sampled_from(["", "<|endoftext|>", "--", "-", "\n\n", "--\n", "é"]),
    st.integers(1, 7),
)
def test_text_is_cut_at_the_separator_however_it_is_read(text, split_on, size):
    content = text.encode()
    blocks = (content[i : i + size] for i in range(0, len(content), size))
    found = list(formats.cut(blocks, split_on, lambda: "here"))
    assert [document.decode() for document, _ in found] == cut_whole(text, split_on)
    assert b"".join(document + mark for document, mark in found) == content  # nothing is lost


def test_a_separator_of_ones_own(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone<|endoftext|>two\n<|endoftext|>\r\nthree\n\n\nfour")
    assert read(path) == ["one<|endoftext|>two\n", "three\n\n\nfour"]
    assert read(path, split_on="<|endoftext|>") == ["one", "two\n", "three\n\n\nfour"]
    assert read(path, split_on="\n\n\n")[1:] == ["four"]
    path.rename(tmp_path / "a.md")
    assert len(read(tmp_path / "a.md", split_on="<|endoftext|>")) == 3


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n--\n" * 100_000 + b"two\n\xe9\n")
    fails(path, f"{path}:200002: cannot be read: UnicodeDecodeError", split_on="--")


# ---------------------------------------- rows


def written(path, rows):
    """`rows`, a list of objects of strings, in the format of the path's name."""
    ending = path.suffixes[0]
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if ending == ".csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue()
    else:
        content = json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows))
    wrap = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(wrap(content.encode()))
    return path


ROW_FILES = ["a.jsonl", "a.json", "a.json.zst", "a.csv", "a.csv.gz", "a.parquet"]


@pytest.mark.parametrize("name", ROW_FILES)
def test_a_key_names_the_text(tmp_path, name):
    texts = ['a "quoted", text\n', "é\r\nb", "x" * 200_000, "", "last"]
    rows = [{"id": str(i), "story, long": text, "text": "no"} for i, text in enumerate(texts)]
    path = written(tmp_path / name, rows)
    assert read(path, text_key="story, long") == list(filter(None, texts))
    named = "'id', 'story, long', 'text'; name one with --text-key"
    fails(path, f"{path}.*'body'.*{named}", text_key="body")


def test_a_json_file_is_a_list_or_one_object(tmp_path):
    path = tmp_path / "a.json"
    for content, expected in (
        ('\ufeff["one", {"text": "two", "id": 1}]', ["one", "two"]),
        ('{"text": "only", "more": [1]}', ["only"]),
        ("[]", []),
    ):
        path.write_text(content)
        assert read(path) == expected
    for content, expected in (
        ('["a", 3]', "item 2: expected a string under the key 'text', found int in place of"),
        ('"text"', "object 1: .*found str in place of an object"),
        ('{"text": ["a"]}', "object 1: .*found list there"),
        ('["a"', "cannot be read as JSON"),
    ):
        path.write_text(content)
        fails(path, f"{path}: {expected}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        ('{"text": "a", "score": NaN}', "'NaN' is no finite number"),
        ('{"text": "a", "score": 1e999}', "'1e999' is no finite number"),
    ],
)
def test_json_that_readers_understand_differently_is_refused(tmp_path, line, expected):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine", "score": 0.5}\n' + line)
    fails(path, f"{path}:2: cannot be read as JSON: {expected}")
    path = tmp_path / "a.json"
    path.write_text(line)
    fails(path, f"{path}: cannot be read as JSON: {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no column 'text'; columns: \\(none\\)"),
        ("text,id,text\na,1,b\n", "2 columns 'text'; .*rename one"),
        ("id,text\n1,a\n2\n", ":3: expected 2 columns as the first line names, found 1"),
        ('id,text\n1,"a\n', "unexpected end of data"),
        ('id,text\n1,"a"b\n', ":2: cannot be read: Error: ',' expected"),
        ("id,text\n1,\xe9\n", ":2: .*can't decode byte"),
    ],
)
def test_damaged_csv_is_refused(tmp_path, content, expected):
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="latin-1")
    fails(path, f"{path}.*{expected}")


def test_csv_skips_empty_lines_and_a_mark_of_utf8(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ROW", 10)  # the limit is of a row, not of the file
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbftext\r\na\r\n\r\n"b\n\nc"\r\n')
    assert read(path) == ["a", "b\n\nc"]


def test_two_parquet_columns_of_the_name_are_refused(tmp_path):
    path, columns = tmp_path / "a.parquet", [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["text", "text"]), path)
    fails(path, f"{path}: 2 columns 'text'; columns: 'text', 'text'; rename one")
    nested = pyarrow.array([{"b": "inner"}])
    parquet.write_table(pyarrow.Table.from_arrays([nested, columns[0]], ["a", "a.b"]), path)
    assert read(path, text_key="a.b") == ["a"]


# ---------------------------------------- the options


def test_options_that_no_file_heeds_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}')
    text, rows = str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")
    cut, key = Reading(split_on="--"), Reading(text_key="body")
    for reading, source in ((cut, rows), (cut, "stdlib"), (cut, "hub:a/b"), (key, text)):
        refuses("only .* heed it, and .* has none", check_reading, reading, [source])
    for reading, sources in ((cut, [rows, text]), (key, [text, rows]), (key, ["hub:a/b"])):
        check_reading(reading, sources)
    refuses("--text-key .*expected text in UTF-8", Reading, "\udcff")
    refuses("--split-on .*at most 1000 characters", Reading, "text", "x" * 1001)


def test_a_folder_prepared_with_other_options_is_refused(tmp_path, tokenizer_file):
    rows = [{"text": f"stone {i}", "body": f"river {i}-- snow {i}"} for i in range(9)]
    written(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.txt").write_text("the river -- the stone -- of snow")
    # the folder of the text may hold the folder of the tokens, which is no text
    spec = {"source": str(tmp_path), "out": str(tmp_path / "out"), "tokenizer": str(tokenizer_file)}
    spec |= {"val_docs": 2, "text_key": "body", "allow_overlap": True}
    prepare(PrepareSpec(**spec, split_on="--"))
    assert "--split-on=--" in command_line(PrepareSpec(**spec, split_on="--"))
    data = open_dataset(tmp_path / "out", 90)
    tokens = data.train.take(0, len(data.train))
    assert (tokens == data.tokenizer.bos_id).sum() == 9 - 2 + 3
    refuses(r"\(split_on: '--' there, '' asked for\)", prepare, PrepareSpec(**spec))
    spec |= {"text_key": "text", "split_on": "--"}
    refuses(r"\(text_key: 'body' there, 'text' asked for\)", prepare, PrepareSpec(**spec))


def test_a_manifest_of_an_earlier_version_names_the_usual_options(tmp_path, tokenizer_file):
    (tmp_path / "a.txt").write_text("river\n<|endoftext|>\nstone\n<|endoftext|>\nsnow")
    spec = PrepareSpec(str(tmp_path / "a.txt"), str(tmp_path / "out"), str(tokenizer_file))
    made = prepare(spec)
    path = tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text())
    for name in ("text_key", "split_on"):
        del values["origin"][name]
    path.write_text(json.dumps(values))
    assert load_manifest(tmp_path / "out") == made == prepare(spec)


# ---------------------------------------- bounds


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_may_unpack_to_a_multiple_of_its_size(tmp_path, monkeypatch, ending):
    wrap = {".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(wrap(b"ab\n" * 40_000))
    most = 1000 + 100 * path.stat().st_size
    for free, refused in ((1000 + 120_000 - most, False), (1000 + 120_000 - most - 1, True)):
        monkeypatch.setattr(formats, "FREE", free)
        if refused:
            fails(path, f"{path}: its {path.stat().st_size} compressed bytes unpack to more than")
        else:
            assert read(path) == ["ab\n" * 40_000]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt", "a.csv.gz", "a.jsonl.gz", "a.json.gz"])
def test_what_is_too_large_is_refused_in_little_memory(tmp_path, monkeypatch, name):
    """Of 4 MiB with a limit of 1 MiB: a list of the short lines would take 26 MiB."""
    monkeypatch.setattr(bounds, "MAX_DOCUMENT", MIB)
    monkeypatch.setattr(formats, "MAX_ROW", MIB)
    quote = {"a.csv.gz": b'text\n"'}.get(name, b"")
    separator = b" " if name.startswith("a.json") else b"\n"
    content = quote + (b"a" + separator) * (2 * MIB)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    tracemalloc.start()
    try:
        fails(path, f"{path}.*more than 1,048,576")
        assert tracemalloc.get_traced_memory()[1] < 5 * MIB
    finally:
        tracemalloc.stop()


def test_short_lines_take_no_more_memory_than_their_document(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a\n" * (4 * MIB)))
    tracemalloc.start()
    try:
        assert [len(text) for text in read(path)] == [8 * MIB]
        assert tracemalloc.get_traced_memory()[1] < 3 * 8 * MIB
    finally:
        tracemalloc.stop()


def parquet_of(path, count, size):
    """`count` rows that share one value of `size` bytes: about 1 KiB."""
    rows = pyarrow.array([0] * count, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(rows, pyarrow.array(["x" * size]))
    table = pyarrow.table({"text": column})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 3000


def test_a_value_in_every_row_of_parquet_is_in_memory_a_few_times(tmp_path):
    path = tmp_path / "a.parquet"
    parquet_of(path, 256, 2 * MIB)
    usual = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool := pyarrow.proxy_memory_pool(usual))
    try:
        assert sum(map(len, documents(str(path)))) == 512 * MIB
    finally:
        pyarrow.set_memory_pool(usual)
    assert 2 * MIB < pool.max_memory() < 20 * MIB


def test_pages_and_documents_of_parquet_have_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    parquet_of(path, 2, 2 * MIB)
    monkeypatch.setattr(bounds, "MAX_DOCUMENT", MIB)
    fails(path, f"{path}: row 1: a document of more than 1,048,576")
    monkeypatch.setattr(formats, "FREE", MIB)
    fails(path, f"{path}: its .* compressed bytes unpack to more than")


@pytest.mark.slow
def test_under_a_limit_of_memory_a_command_ends_in_one_line(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"ab\n" * (100 * MIB)))
    parquet_of(tmp_path / "b.parquet", 256, 80 * MIB)
    for name in ("a.txt.gz", "b.parquet"):
        options = ("--source", tmp_path / name, "--out", tmp_path / "out", "--workers", 1)
        limited = ("sh", "-c", 'ulimit -v "$0" && exec "$@"', 3 * MIB)  # KiB
        command = map(str, (*limited, sys.executable, "-m", "sngpt_jax.prepare", *options))
        done = subprocess.run([*command], capture_output=True, text=True, timeout=120)
        message = f"error: {re.escape(str(tmp_path / name))}: its .* bytes unpack to more than .*\n"
        assert done.returncode == 2 and re.fullmatch(message, done.stderr), done.stderr
