"""Prepared shards against a plain computation, with any workers and any number of kills."""

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sngpt_jax.base.errors import one_line
from sngpt_jax.data import golf
from sngpt_jax.data import manifest as manifests
from sngpt_jax.data import preparation as module
from sngpt_jax.data.encode import cut_chunks, encoder
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset, open_shard, write_shard
from sngpt_jax.data.spec import PrepareSpec, command_line
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.prepare import main
from tests.data.conftest import contents, refuses, start, wait_until, write_jsonl

VOCAB = 90  # of the tokenizer that most tests use


@pytest.fixture
def texts(tmp_path):
    """The documents of the text that most tests prepare."""
    return write_jsonl(tmp_path / "text.jsonl", 120)


@pytest.fixture
def spec_in(tmp_path, tokenizer_file):
    """A function from a folder's name and other settings to what prepares the text there."""
    usual = {"tokenizer": str(tokenizer_file), "val_docs": 7, "shard_tokens": 500}

    def spec(out, source="text.jsonl", **changes):
        return PrepareSpec(str(tmp_path / source), str(tmp_path / out), **(usual | changes))

    return spec


# ---------------------------------------- what is written


def test_shards_are_the_documents_tokens_in_order_cut_every_so_many(
    spec_in, texts, tmp_path, tokenizer_file
):
    manifest = prepare(spec_in("out"))
    tokenizer = load_tokenizer(tokenizer_file)
    table = tokenizer.token_bytes()
    for split, part in (("val", texts[:7]), ("train", texts[7:])):
        documents = [*map(tokenizer.encode_document, part)]
        encoded = [document.tokens for document in documents]
        expected = np.concatenate(encoded)
        assert any(document.lossy for document in documents)  # so that the sidecars are tested
        entries = getattr(manifest, split)
        names = [f"{split}_{i:06d}.bin" for i in range(-(-len(expected) // 500))]
        assert [e.name for e in entries] == names
        assert [e.tokens for e in entries[:-1]] == [500] * (len(entries) - 1)
        raw = [np.fromfile(tmp_path / "out" / e.name, "<u2", offset=1024) for e in entries]
        np.testing.assert_array_equal(np.concatenate(raw), expected)
        assert [e.documents for e in entries] == [int((r == tokenizer.bos_id).sum()) for r in raw]
        sizes = [document.bytes for document in documents]
        assert sum(e.text_bytes for e in entries) == sum(size.text for size in sizes)

        data = open_dataset(tmp_path / "out", VOCAB)
        stream = getattr(data, split)
        for lengths, bytes_ in (
            (
                [e.tokens for e in entries],
                [(e.golf_bytes, e.text_bytes, e.source_bytes, e.lossy_documents) for e in entries],
            ),
            ([len(tokens) for tokens in encoded], sizes),
        ):
            edges = itertools.pairwise(np.cumsum([0, *lengths]))
            # the first token is BOS
            assert [stream.count_bytes(table, max(a, 1), b) for a, b in edges] == bytes_
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert not (tmp_path / "out" / "progress.json").exists()
    manifests.verify(tmp_path / "out")


def test_validation_text_of_its_own(spec_in, texts, tmp_path):
    val = tmp_path / "val.jsonl"
    val_texts = write_jsonl(val, 5, seed=1)
    manifest = prepare(spec_in("out", val_docs=0, val_source=str(val)))
    assert sum(e.documents for e in manifest.val) == len(val_texts)
    assert sum(e.documents for e in manifest.train) == len(texts)


def test_max_tokens_is_exact(spec_in, texts, tmp_path):
    full = prepare(spec_in("full"))
    whole = open_dataset(tmp_path / "full", VOCAB).train
    for most in (1, 499, 500, 501, 1234):
        manifest = prepare(spec_in(str(most), max_tokens=most))
        assert sum(e.tokens for e in manifest.train) == most and manifest.val == full.val
        cut = open_dataset(tmp_path / str(most), VOCAB).train
        np.testing.assert_array_equal(cut.take(0, most), whole.take(0, most))


def test_a_learnt_tokenizer_has_not_seen_the_validation_text(spec_in, tmp_path):
    texts = ["zzzz qqqq zzzz qqqq"] * 3 + ["the river and the stone"] * 60
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    learnt = {"tokenizer": "train", "vocab_size": 280, "normalization": "identity"}
    spec, out = spec_in("out", val_docs=3, shard_tokens=10_000, **learnt), tmp_path / "out"
    manifest = prepare(spec)
    tokenizer = open_dataset(out, 280).tokenizer
    assert manifest.tokenizer.sha256 == tokenizer.sha256
    assert len(tokenizer.encode("river")) < 5 and len(tokenizer.encode("zzzz")) >= 4
    assert tokenizer.decode(open_shard(out / "train_000000.bin")) == "".join(texts[3:])
    assert prepare(spec) == manifest


# ---------------------------------------- the same bytes, always


class Killed(Exception):
    pass


def test_chunks_keep_every_document_and_its_number(monkeypatch):
    monkeypatch.setattr("sngpt_jax.data.encode._CHUNK_CHARACTERS", 10)
    texts = ["", "abc", "defghij", "k" * 40, "", "l"]
    numbered = [(number**2, text) for number, text in enumerate(texts)]
    chunks = list(cut_chunks(numbered))
    assert chunks == [numbered[:3], numbered[3:4], numbered[4:]]
    assert list(cut_chunks([])) == []


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_files_and_imports_no_jax(spec_in, tmp_path):
    write_jsonl(tmp_path / "text.jsonl", 2500)  # several chunks
    one, three = (spec_in(name, shard_tokens=30_000) for name in ("one", "three"))
    one = prepare(one)
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    options = [*command_line(three), "--workers", 3, "--json"]
    process = start(*options, env={**os.environ, "PYTHONPATH": path})
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    summary = json.loads(output)
    assert summary["train"]["tokens"] == sum(e.tokens for e in one.train)
    assert summary["train"]["documents"] == 2493 and summary["val"]["documents"] == 7


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Kills the process just before or after the nth call of a function of `os`.
DRIVER = """
import os, signal, sys
name, when, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
original = getattr(os, name)

def counted(*arguments, **options):
    global count
    count -= 1
    if count == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **options)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(os, name, counted)
from sngpt_jax.base import cli
from sngpt_jax.prepare import main
sys.argv = sys.argv[:1] + sys.argv[4:]
cli.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.full), 2])
def test_killed_again_and_again_it_ends_with_the_same_files(spec_in, tmp_path, workers):
    write_jsonl(tmp_path / "text.jsonl", 2500)
    whole, killed = (
        spec_in(name, val_docs=0, val_fraction=0.14, shard_tokens=20_000)
        for name in ("whole", "out")
    )
    manifest = prepare(whole)
    assert len(manifest.val) >= 2 and len(manifest.train) >= 8
    assert manifest.separation.dropped >= 5
    options = [*command_line(killed), "--workers", workers]
    seen = set()
    moments = [("replace", "after", 2)]  # the tokenizer is in place, the journal does not know it
    moments += [("replace", "before", 7)]  # between shards of the validation split, or at its end
    # a file that the journal does not know; half a file
    moments += [("replace", "after", 5), ("fsync", "before", 9)]
    for moment in moments:
        command = [sys.executable, "-c", DRIVER, *map(str, (*moment, *options))]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                seen.update(map(int, children.split()))
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert bool(seen) == (workers > 1)
    wait_until(lambda: not any(map(running, seen)))  # no worker outlives its parent
    assert list((tmp_path / "out").glob("*.tmp-*"))
    _, errors = start(*options).communicate(timeout=60)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole"), errors


# ---------------------------------------- again, and otherwise


def test_a_finished_folder_is_left_as_it_is(spec_in, texts, tmp_path, monkeypatch):
    spec = spec_in("out")
    first = prepare(spec)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = lambda *_: pytest.fail("read the text again")  # noqa: E731
    monkeypatch.setattr("sngpt_jax.data.split.documents", again)
    assert prepare(spec, workers=4) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "train_000001.bin").unlink()
    refuses(r"train_000001\.bin: missing", prepare, spec)


def test_another_preparation_in_the_same_folder_is_refused_by_the_fields_that_differ(
    spec_in, texts, tmp_path
):
    prepare(spec_in("out"))
    message = r"\(val_docs: 7 there, 8 asked for; shard_tokens: 500 there, 400 asked for\)"
    refuses(message, prepare, spec_in("out", shard_tokens=400, val_docs=8))
    write_jsonl(tmp_path / "other.jsonl", 120, seed=3)
    refuses(r"\(source: ", prepare, spec_in("out", "other.jsonl"))


def test_only_the_same_preparation_resumes_a_folder(spec_in, texts, tmp_path, monkeypatch):
    spec = spec_in("out")
    saved = module.save

    def killed_at_third_shard(value, directory):
        saved(value, directory)
        if len(value.val.shards) + len(value.train.shards) == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save", killed_at_third_shard)
        prepare(spec)
    refuses("shard_tokens: 500 there, 600 asked for", prepare, spec_in("out", shard_tokens=600))
    tokenizer = tmp_path / "out" / "tokenizer.model"
    kept = tokenizer.read_bytes()
    tokenizer.write_bytes(kept + b"x")
    refuses("expected SHA-256 .* changed since the preparation began", prepare, spec)
    tokenizer.write_bytes(kept)
    prepare(spec)
    prepare(spec_in("whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_few_documents_say_so_and_leave_the_folder_usable(spec_in, texts, tokenizer_file):
    message = r"text\.jsonl holds 120 documents and --val-docs 120 leaves none .* lower --val-docs"
    for tokenizer in (str(tokenizer_file), "train"):
        refuses(message, prepare, spec_in("out", tokenizer=tokenizer, val_docs=120))
    manifest = prepare(spec_in("out", val_docs=119))
    assert sum(e.documents for e in manifest.train) == 1


def test_two_preparations_do_not_write_into_one_folder(spec_in, texts, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses("another preparation is writing there", prepare, spec_in("out"))
    prepare(spec_in("out"))


def test_a_folder_of_other_shards_is_not_written_into(spec_in, texts, tmp_path):
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "fineweb_train_000000.bin", np.ones(3, np.uint16))
    refuses(r"holds \.bin files of no preparation", prepare, spec_in("out"))


def test_the_same_text_for_training_and_validation_is_refused(spec_in, texts, tmp_path):
    text, copy = tmp_path / "text.jsonl", tmp_path / "copy"
    copy.mkdir()
    (copy / "text.jsonl").write_bytes(text.read_bytes())
    for source in (text, copy):
        spec = spec_in("out", val_docs=0, val_source=str(source))
        refuses("is the same text as --source .*text.jsonl", prepare, spec)
    assert not (tmp_path / "out").exists()


def test_a_folder_inside_the_text_is_no_text_itself(spec_in, tmp_path):
    (tmp_path / "text").mkdir()
    write_jsonl(tmp_path / "text" / "a.jsonl", 20)
    refuses("it is the folder of the text", prepare, spec_in("text/../text", "text"))
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["a.jsonl"]
    elsewhere = prepare(spec_in("out", "text"))
    for _ in range(2):
        assert prepare(spec_in("text/deep/out", "text")) == elsewhere


def test_a_folder_that_cannot_be_made_is_one_line(spec_in, texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        prepare(spec_in("file/out"))
    assert "file/out: Not a directory" in (one_line(caught.value) or "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_cannot_be_tokenized_is_named(tokenizer_file, workers):
    with encoder(tokenizer_file, workers) as encode:
        chunks = [[(40, "fine")], [(41, "fine"), (50, None), (51, "fine")]]
        results = encode("text.jsonl", iter(chunks))
        assert len(next(results)) == 1
        refuses("^text.jsonl: document 51 cannot be tokenized: ", next, results)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shard_tokens": 0}, "--shard-tokens 0: expected at least 1"),
        ({"shard_tokens": 2**31}, "--shard-tokens 2147483648: expected at most 2147483647"),
        ({"val_docs": -1}, "--val-docs -1: expected at least 0"),
        ({"val_fraction": 0.1}, "--val-docs and --val-fraction exclude each other"),
        ({"val_docs": 0, "val_fraction": 1.0}, "--val-fraction 1.0: expected less than 1"),
        ({"val_docs": 0, "val_fraction": float("nan")}, "--val-fraction nan: expected less than 1"),
        ({"split_seed": 7}, "--split-seed draws documents, which --val-docs does not"),
        ({"max_tokens": -1}, "--max-tokens -1: expected at least 0"),
        ({"vocab_size": 89}, "expected at most --vocab-size 89 tokens, found 90"),
    ],
)
def test_impossible_options_are_refused(spec_in, texts, tmp_path, changes, message):
    refuses(message, prepare, spec_in("out", **changes))
    assert not (tmp_path / "out").exists()


# ---------------------------------------- the command


def test_command_prints_a_summary_or_json_and_verifies(spec_in, texts, tmp_path, capsys):
    out, options = tmp_path / "out", [*command_line(spec_in("out")), "--workers", "1"]
    assert main([*options, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["val"]["documents"] == 7 and summary["train"]["documents"] == 113
    assert summary["tokenizer"]["vocab_size"] == VOCAB
    assert main([*options, "--json", str(tmp_path / "summary.json")]) == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    said = capsys.readouterr()
    assert "  validation  " in said.out and " 7 documents, " in said.out
    assert f"--data.dir {out}" in said.err

    assert main(["--verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary
    with (out / "train_000000.bin").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    refuses(r"train_000000\.bin: expected SHA-256", main, [f"--verify={out}"])


def test_published_shards_are_fetched_and_opened(tmp_path, tokenizer_file, monkeypatch, capsys):
    def download(out, *, vocab_size, train_shards):
        assert (vocab_size, train_shards) == (VOCAB, 2)
        out.mkdir(exist_ok=True)
        for name in ("val_000000", "train_000000", "train_000001"):
            write_shard(out / f"fineweb_{name}.bin", np.arange(10, dtype=np.uint16))
        (out / "fineweb_99_bpe.model").write_bytes(tokenizer_file.read_bytes())

    monkeypatch.setattr(golf, "download", download)
    source, folder = f"golf:sp{VOCAB}", str(tmp_path / "golf")
    options = ["--source", source, "--out", folder, "--train-shards", "2"]
    assert main([*options, "--json", "--vocab-size", str(VOCAB + 6)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["train"] == {"shards": 2, "tokens": 20}
    assert summary["tokenizer"]["file"] == "fineweb_99_bpe.model"
    for more, message in (
        (["--val-docs", "3", "--max-tokens", "5"], "it takes no --val-docs, --max-tokens"),
        (["--vocab-size", "89"], f"expected at most --vocab-size 89 tokens, found {VOCAB}"),
    ):
        refuses(f"--source {source}.*{message}", main, [*options, *more])
    refuses("expected golf or golf:spV", main, ["--source", "golf:1024", "--out", folder])


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], 1024), (["--vocab-size", "1024"], 1024), (["--vocab-size", "4096"], 4096)],
)
def test_golf_alone_means_the_vocabulary_asked_for(tmp_path, monkeypatch, options, expected):
    def download(out, *, vocab_size, train_shards):
        raise Killed(vocab_size)

    monkeypatch.setattr(golf, "download", download)
    with pytest.raises(Killed) as caught:
        main(["--source", "golf", "--out", str(tmp_path), *options])
    assert caught.value.args == (expected,)


def test_progress_tells_the_share_of_the_text(spec_in, tmp_path, monkeypatch):
    """By bytes of plain text, held-out documents, or the tokens of a limit; else none."""
    texts = ["river stone snow\n" * 40] * 60
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    said: dict[str, list[tuple[float, float]]] = {}

    def one_by_one(texts):
        return ([numbered] for numbered in texts)

    def reporter(label):
        calls = said.setdefault(label.rpartition("/")[2], [])
        return lambda done, total, note="": calls.append((done, total))

    monkeypatch.setattr(module, "cut_chunks", one_by_one)
    monkeypatch.setattr(module, "progress_reporter", reporter)
    for name, ending, limit in (("txt", "txt", 0), ("limited", "txt", 300), ("jsonl", "jsonl", 0)):
        rule = {"val_docs": 10, "allow_overlap": True, "max_tokens": limit}
        prepare(spec_in(name, f"text.{ending}", **rule))
    assert said["txt: val"] == [(n / 10, 1) for n in range(1, 10)] + [(0.999, 1), (1, 1)]
    *shares, last = [share for share, _ in said["txt: train"]]
    expected = [min(n / 50, 0.999) for n in range(1, 51)]
    assert shares == pytest.approx(expected, abs=0.03) and last == 1
    limited = said["limited: train"]
    assert limited[0][0] > 2 * shares[0] and len(limited) <= len(shares)
    assert limited[-1] == (1, 1)
    assert said["jsonl: train"][:-1] == [(0.0, False)] * 50
