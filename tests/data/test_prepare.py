"""Prepared shards against a plain sequential computation, whatever the workers and however often
the process is killed.
"""

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

from sngpt_jax.base.errors import UserError, one_line
from sngpt_jax.data import golf
from sngpt_jax.data import manifest as manifests
from sngpt_jax.data import preparation as module
from sngpt_jax.data.encode import cut_chunks, encoder
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset, open_shard, write_shard
from sngpt_jax.data.spec import PrepareSpec
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.prepare import main
from tests.data.conftest import refuses, write_jsonl

VOCAB = 90  # of the tokenizer that most tests use


@pytest.fixture
def text(tmp_path):
    return tmp_path / "text.jsonl", write_jsonl(tmp_path / "text.jsonl", 120)


def spec_for(source, out, tokenizer_file, **changes):
    settings = {"tokenizer": str(tokenizer_file), "val_docs": 7, "shard_tokens": 500} | changes
    return PrepareSpec(source=str(source), out=str(out), **settings)


@pytest.fixture
def spec_in(text, tmp_path, tokenizer_file):
    """A function from a folder's name and options to the spec that prepares the text there."""
    return lambda out, **changes: spec_for(text[0], tmp_path / out, tokenizer_file, **changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


# ---------------------------------------- what is written


def test_shards_are_the_documents_tokens_in_order_cut_every_so_many(
    spec_in, text, tmp_path, tokenizer_file
):
    _, texts = text
    manifest = prepare(spec_in("out"))
    tokenizer = load_tokenizer(tokenizer_file)
    table = tokenizer.token_bytes()
    for split, part in (("val", texts[:7]), ("train", texts[7:])):
        encoded = [tokenizer.encode_document(t) for t in part]
        expected = np.concatenate([e.tokens for e in encoded])
        assert sum(len(e.extra) for e in encoded) > 0  # so that the sidecars are tested
        entries = getattr(manifest, split)
        assert [e.name for e in entries] == [
            f"{split}_{i:06d}.bin" for i in range(-(-len(expected) // 500))
        ]
        assert [e.tokens for e in entries[:-1]] == [500] * (len(entries) - 1)
        raw = [np.fromfile(tmp_path / "out" / e.name, "<u2", offset=1024) for e in entries]
        np.testing.assert_array_equal(np.concatenate(raw), expected)
        assert sum(e.documents for e in entries) == len(part)
        assert [e.documents for e in entries] == [int((r == tokenizer.bos_id).sum()) for r in raw]
        assert sum(e.bytes for e in entries) == sum(e.bytes for e in encoded)

        data = open_dataset(tmp_path / "out", VOCAB)
        stream = getattr(data, split)
        # the first is BOS
        counted = np.concatenate([[0], stream.target_bytes(table, 1, len(stream))])
        for pieces, lengths in (
            (entries, [e.tokens for e in entries]),
            (encoded, [len(e.tokens) for e in encoded]),
        ):
            edges = itertools.pairwise(np.cumsum([0, *lengths]))
            assert [counted[a:b].sum() for a, b in edges] == [e.bytes for e in pieces]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert not (tmp_path / "out" / "progress.json").exists()
    manifests.verify(tmp_path / "out")


def test_validation_text_of_its_own(text, tmp_path, tokenizer_file):
    source, texts = text
    val_texts = write_jsonl(tmp_path / "val.jsonl", 5, seed=1)
    spec = spec_for(
        source, tmp_path / "out", tokenizer_file, val_source=str(tmp_path / "val.jsonl")
    )
    manifest = prepare(spec)
    assert sum(e.documents for e in manifest.val) == len(val_texts)
    assert sum(e.documents for e in manifest.train) == len(texts)


def test_max_tokens_is_exact(spec_in, text, tmp_path, tokenizer_file):
    full = prepare(spec_in("full"))
    whole = open_dataset(tmp_path / "full", VOCAB).train
    for most in (1, 499, 500, 501, 1234):
        out = tmp_path / str(most)
        manifest = prepare(spec_for(text[0], out, tokenizer_file, max_tokens=most))
        assert sum(e.tokens for e in manifest.train) == most and manifest.val == full.val
        cut = open_dataset(out, VOCAB).train
        np.testing.assert_array_equal(cut.take(0, most), whole.take(0, most))


def test_a_learnt_tokenizer_has_not_seen_the_validation_text(tmp_path):
    texts = ["zzzz qqqq zzzz qqqq"] * 3 + ["the river and the stone"] * 60
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source, out = str(tmp_path / "text.jsonl"), tmp_path / "out"
    spec = PrepareSpec(source, str(out), val_docs=3, vocab_size=280, normalization="identity")
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
    chunks = list(cut_chunks(texts, 5))
    assert chunks == [(5, ["", "abc", "defghij"]), (8, ["k" * 40]), (9, ["", "l"])]
    assert list(cut_chunks([], 1)) == []


def command(*arguments, **more):
    full = [sys.executable, "-m", "sngpt_jax.prepare", *map(str, arguments)]
    return subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def options_for(source, out, tokenizer_file, *more):
    given = ["--source", source, "--tokenizer", tokenizer_file, "--out", out, *more]
    return [str(word) for word in given]


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_files_and_imports_no_jax(tmp_path, tokenizer_file):
    source = tmp_path / "text.jsonl"
    write_jsonl(source, 2500)  # several chunks
    one = prepare(spec_for(source, tmp_path / "one", tokenizer_file, shard_tokens=30_000))
    (tmp_path / "jax.py").write_text("raise ImportError('jax was imported')")
    more = ["--val-docs", 7, "--shard-tokens", 30_000, "--workers", 3, "--json"]
    process = command(
        *options_for(source, tmp_path / "three", tokenizer_file, *more),
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
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


# Runs the command and kills the process at the nth call of a function of `os`: just before it, or
# just after.
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
def test_killed_again_and_again_it_ends_with_the_same_files(tmp_path, tokenizer_file, workers):
    source = tmp_path / "text.jsonl"
    write_jsonl(source, 2500)
    sizes = {"val_docs": 350, "shard_tokens": 20_000}
    manifest = prepare(spec_for(source, tmp_path / "whole", tokenizer_file, **sizes))
    assert len(manifest.val) >= 2 and len(manifest.train) >= 8
    more = ["--val-docs", 350, "--shard-tokens", 20_000, "--workers", workers]
    options = options_for(source, tmp_path / "out", tokenizer_file, *more)
    seen = set()
    moments = [("replace", "after", 2)]  # the tokenizer is in place, the journal does not know it
    moments += [("replace", "before", 7)]  # between shards of the validation split, or at its end
    # a file that the journal does not know; half a file
    moments += [("replace", "after", 5), ("fsync", "before", 9)]
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, moment), *options], stderr=subprocess.DEVNULL
        )
        while process.poll() is None:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                seen.update(map(int, children.split()))
            time.sleep(0.01)
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert bool(seen) == (workers > 1)
    deadline = time.monotonic() + 10
    while any(map(running, seen)):  # no worker outlives its parent
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert list((tmp_path / "out").glob("*.tmp-*"))
    _, errors = command(*options).communicate(timeout=60)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole"), errors


# ---------------------------------------- again, and otherwise


def test_a_finished_folder_is_left_as_it_is(spec_in, text, tmp_path, monkeypatch):
    spec = spec_in("out")
    first = prepare(spec)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    def unexpected(*_):
        raise AssertionError("read the text again")

    monkeypatch.setattr(module, "documents", unexpected)
    assert prepare(spec, workers=4) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "train_000001.bin").unlink()
    refuses(r"train_000001\.bin: missing", prepare, spec)


def test_another_preparation_in_the_same_folder_is_refused_by_the_fields_that_differ(
    spec_in, tmp_path, tokenizer_file
):
    prepare(spec_in("out"))
    with pytest.raises(UserError) as caught:
        prepare(spec_in("out", shard_tokens=400, val_docs=8))
    message = str(caught.value)
    assert "val_docs: 7 there, 8 asked for; shard_tokens: 500 there, 400 asked for" in message
    assert "tokenizer:" not in message
    write_jsonl(tmp_path / "other.jsonl", 120, seed=3)
    refuses(
        r"\(source: ", prepare, spec_for(tmp_path / "other.jsonl", tmp_path / "out", tokenizer_file)
    )


def test_an_unfinished_folder_is_only_gone_on_with_by_the_same_preparation(
    spec_in, tmp_path, monkeypatch
):
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
    kept = (tmp_path / "out" / "tokenizer.model").read_bytes()
    (tmp_path / "out" / "tokenizer.model").write_bytes(kept + b"x")
    refuses(
        r"tokenizer\.model: expected SHA-256 .* changed since the preparation began", prepare, spec
    )
    (tmp_path / "out" / "tokenizer.model").write_bytes(kept)
    prepare(spec)
    prepare(spec_in("whole"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_few_documents_say_so_and_leave_the_folder_usable(
    spec_in, text, tmp_path, tokenizer_file
):
    message = (
        r"text\.jsonl holds 120 documents and --val-docs 120 leaves none .* lower --val-docs or"
        r" give --val-source"
    )
    for tokenizer in (tokenizer_file, "train"):
        refuses(message, prepare, spec_for(text[0], tmp_path / "out", tokenizer, val_docs=120))
    manifest = prepare(spec_in("out", val_docs=119))
    assert sum(e.documents for e in manifest.train) == 1


def test_two_preparations_do_not_write_into_one_folder(spec_in, tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses("another preparation is writing there", prepare, spec_in("out"))
    prepare(spec_in("out"))


def test_a_folder_of_other_shards_is_not_written_into(spec_in, tmp_path):
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "fineweb_train_000000.bin", np.ones(3, np.uint16))
    refuses(r"holds \.bin files that no preparation here has written", prepare, spec_in("out"))


def test_the_same_text_for_training_and_validation_is_refused(spec_in, text, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "text.jsonl").write_bytes(text[0].read_bytes())
    for val_source in (text[0], copy):
        refuses(
            "is the same text as --source .*text.jsonl",
            prepare,
            spec_in("out", val_source=str(val_source)),
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line(text, tmp_path, tokenizer_file):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError) as caught:
        prepare(spec_for(text[0], tmp_path / "file" / "out", tokenizer_file))
    assert "file/out: Not a directory" in (one_line(caught.value) or "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_cannot_be_tokenized_is_named(tokenizer_file, workers):
    with encoder(tokenizer_file, workers) as encode:
        results = encode("text.jsonl", iter([(41, ["fine"]), (42, ["fine", None, "fine"])]))
        assert len(next(results)) == 1
        with pytest.raises(UserError) as caught:
            next(results)
    message = str(caught.value)
    assert message.startswith("text.jsonl: document 43 cannot be tokenized: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shard_tokens": 0}, "--shard-tokens 0: expected at least 1"),
        ({"shard_tokens": 2**31}, "--shard-tokens 2147483648: expected at most 2147483647"),
        ({"val_docs": 0}, "--val-docs 0: expected at least 1"),
        ({"max_tokens": -1}, "--max-tokens -1: expected at least 0"),
        ({"vocab_size": 89}, "expected at most --vocab-size 89 tokens, found 90"),
    ],
)
def test_impossible_options_are_refused(spec_in, tmp_path, changes, message):
    refuses(message, prepare, spec_in("out", **changes))
    assert not (tmp_path / "out").exists()


# ---------------------------------------- the command


def test_command_prints_a_summary_or_json_and_verifies(text, tmp_path, tokenizer_file, capsys):
    out = tmp_path / "out"
    options = options_for(text[0], out, tokenizer_file, "--workers", 1)
    assert main([*options, "--val-docs", "7", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["val"]["documents"] == 7 and summary["train"]["documents"] == 113
    assert summary["tokenizer"]["vocab_size"] == VOCAB
    assert main([*options, "--json", str(tmp_path / "summary.json"), "--val-docs", "7"]) == 0
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


def test_progress_tells_the_share_of_the_text(tmp_path, tokenizer_file, monkeypatch):
    """The share comes from the bytes of plain text, the documents of a held-out split, or the
    tokens of a limit. Other files have none.
    """
    texts = ["river stone snow\n" * 40] * 60
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts))
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    said: dict[str, list[tuple[float, float]]] = {}

    def one_by_one(texts, first):
        return ((number, [text]) for number, text in enumerate(texts, first))

    def reporter(label):
        calls = said.setdefault(label.rpartition("/")[2], [])
        return lambda done, total, note="": calls.append((done, total))

    monkeypatch.setattr(module, "cut_chunks", one_by_one)
    monkeypatch.setattr(module, "progress_reporter", reporter)
    for name, ending, more in (
        ("txt", "txt", {}),
        ("limited", "txt", {"max_tokens": 300}),
        ("jsonl", "jsonl", {}),
    ):
        source = tmp_path / f"text.{ending}"
        assert prepare(spec_for(source, tmp_path / name, tokenizer_file, val_docs=10, **more))
    assert said["txt: val"] == [(n / 10, 1) for n in range(1, 10)] + [(0.999, 1), (1, 1)]
    *shares, last = [share for share, _ in said["txt: train"]]
    expected = [min(n / 50, 0.999) for n in range(1, 51)]
    assert shares == pytest.approx(expected, abs=0.03) and last == 1
    limited = said["limited: train"]
    assert limited[0][0] > 2 * shares[0] and len(limited) <= len(shares)
    assert limited[-1] == (1, 1)
    assert said["jsonl: train"][:-1] == [(0.0, False)] * 50
