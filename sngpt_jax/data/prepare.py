"""Text to token shards: `python -m sngpt_jax.data.prepare --source … --tokenizer … --out DIR`.

The documents keep their order: the first `val_docs` (or all of `val_source`) are the validation split, the rest the training
split. Each is its BOS token and its text's tokens, without an end token, and shards cut the sequence wherever they are full. So
the files depend on the text, the tokenizer and the shard size alone, not on the number of workers or on how often the
preparation was killed and started again.
"""

import contextlib
import fcntl
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import tyro

from sngpt_jax import cli
from sngpt_jax.cli import UserError
from sngpt_jax.data.corpus import documents, download_golf
from sngpt_jax.data.encode import cut_chunks, encoder
from sngpt_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    Manifest,
    Origin,
    Progress,
    TokenizerEntry,
    file_sha256,
    load_manifest,
    load_progress,
    save,
    verify,
)
from sngpt_jax.data.shards import MAX_SHARD_TOKENS, Dataset, open_dataset, open_entries, write_hashed
from sngpt_jax.data.spec import COMMAND, PrepareSpec, check_size, differing_fields, origin_of
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from sngpt_jax.data.writer import SplitWriter

_FIRST_REPORT, _NEXT_REPORT = 2.0, 10.0  # seconds before and between lines of progress where there is no terminal
_GOLF_VOCAB_SIZE = 1024


def _cpus() -> int:
    """The processors that this process may use, which a batch scheduler limits; macOS has no such set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Arguments(PrepareSpec):
    """Text to token shards. `--verify DIR` alone reads a finished folder back and compares every checksum."""

    workers: int = _cpus()  # processes that tokenize
    train_shards: int = 80  # of a golf source: how many of its training shards to fetch
    json: str = ""  # print the summary as one JSON object (--json), or write it to a file (--json PATH)


@dataclass(frozen=True)
class VerifyArguments:
    """Reads a finished folder back and compares every checksum."""

    verify: str  # the folder
    json: str = ""  # as for a preparation


# ---------------------------------------------------------------------------------------------- what is seen of it


@contextlib.contextmanager
def _reporter(out: Path) -> Iterator[Callable[[str, int, int], None]]:
    """A function of (split, documents, tokens) that shows progress on stderr: a live line, or a line every few seconds."""
    start = time.monotonic()

    def line(split: str, count: int, tokens: int) -> str:
        return f"{out}: {split}: {count:,} documents, {tokens:,} tokens, {time.monotonic() - start:.0f} s"

    if sys.stderr.isatty():
        columns = (rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}", markup=False))
        with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
            task = bar.add_task(f"{out}: reading")
            yield lambda split, count, tokens: bar.update(task, description=line(split, count, tokens))
        return
    next_line = start + _FIRST_REPORT

    def report(split: str, count: int, tokens: int) -> None:
        nonlocal next_line
        if time.monotonic() >= next_line:
            print(line(split, count, tokens), file=sys.stderr, flush=True)
            next_line = time.monotonic() + _NEXT_REPORT

    yield report


# ---------------------------------------------------------------------------------------------- the splits' documents


def _nonempty(texts: Iterator[str], message: str) -> Iterator[str]:
    first = next(texts, None)
    if first is None:
        raise UserError(message)
    return itertools.chain([first], texts)


def _train_documents(spec: PrepareSpec) -> Iterator[str]:
    texts = documents(spec.source)
    if spec.val_source:
        return _nonempty(texts, f"--source {spec.source} holds no documents")
    held_out = sum(1 for _ in itertools.islice(texts, spec.val_docs))
    return _nonempty(
        texts,
        f"--source {spec.source} holds {held_out} documents and --val-docs {spec.val_docs} leaves none to train on;"
        " lower --val-docs or give --val-source",
    )


def _val_documents(spec: PrepareSpec) -> Iterator[str]:
    if spec.val_source:
        return _nonempty(documents(spec.val_source), f"--val-source {spec.val_source} holds no documents")
    return itertools.islice(documents(spec.source), spec.val_docs)


# ---------------------------------------------------------------------------------------------- the folder


def _refuse_other(out: Path, old: Origin, new: Origin) -> None:
    if lines := differing_fields(old, asdict(new)).values():
        raise UserError(f"{out}: holds another preparation's data ({'; '.join(lines)}); give another --out, or delete it")


def _finished(out: Path, origin: Origin) -> Manifest | None:
    """The manifest of a folder that is complete and of this origin, or None where it is not complete."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = load_manifest(out)
    _refuse_other(out, manifest.origin, origin)
    open_entries(out, (*manifest.val, *manifest.train))
    return manifest


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another preparation is writing there; wait for it, or give another --out") from None
        yield


def _begin_or_resume(out: Path, origin: Origin) -> Progress:
    for stale in out.glob("*.tmp-*"):  # of a killed run: the lock is ours
        stale.unlink()
    if (out / PROGRESS).is_file():
        progress = load_progress(out)
        if progress.origin == origin:
            return progress
        if progress.train.shards or progress.val.shards:
            _refuse_other(out, progress.origin, origin)
    elif any(out.glob("*.bin")):
        raise UserError(f"{out}: holds .bin files that no preparation here has written; give an empty --out")
    progress = Progress(format=FORMAT, origin=origin)
    save(progress, out)
    return progress


def _tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(tokenizer.path.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos_id)


def _place_tokenizer(spec: PrepareSpec, out: Path, origin: Origin) -> TokenizerEntry:
    if spec.tokenizer == "train":
        path = out / "tokenizer.model"
        print(f"{out}: learning a tokenizer of {origin.vocab_size} tokens", file=sys.stderr, flush=True)
        texts = _train_documents(spec)
        tokenizer = train_sentencepiece(texts, path, vocab_size=origin.vocab_size, normalization=spec.normalization)
    else:
        path = out / f"tokenizer{Path(spec.tokenizer).suffix}"
        write_hashed(path, Path(spec.tokenizer).read_bytes())
        tokenizer = load_tokenizer(path)
    return _tokenizer_entry(tokenizer)


def _write_splits(spec: PrepareSpec, out: Path, progress: Progress, workers: int) -> Progress:
    assert progress.tokenizer is not None
    path = out / progress.tokenizer.file
    expected, found = progress.tokenizer.sha256, file_sha256(path)
    if found != expected:
        raise UserError(f"{path}: changed since the preparation began: expected SHA-256 {expected}, found {found}")
    sources = {"val": spec.val_source or spec.source, "train": spec.source}
    # Both are opened before anything is written, so that a source that is too small is known at once.
    texts = {"train": _train_documents(spec), "val": _val_documents(spec)}
    token_bytes = load_tokenizer(path).token_bytes()

    with encoder(path, workers) as encode, _reporter(out) as report:
        for split in ("val", "train"):
            done = getattr(progress, split)
            if done.finished:
                continue

            def on_shard(reached: Any, split: str = split) -> None:
                nonlocal progress
                progress = replace(progress, **{split: reached})
                save(progress, out)

            limit = spec.max_tokens if split == "train" and spec.max_tokens else None
            writer = SplitWriter(
                out, split, spec.shard_tokens, limit=limit, token_bytes=token_bytes, progress=done, on_shard=on_shard
            )
            left = itertools.islice(texts[split], done.documents, None)
            first = done.documents + 1 + (spec.val_docs if split == "train" and not spec.val_source else 0)
            for chunk in encode(sources[split], cut_chunks(left, first)):
                for tokens, extra in chunk:
                    writer.append(tokens, extra)
                report(split, writer.documents, writer.tokens)
                if writer.full:
                    break
            writer.finish()
    return progress


def _make(spec: PrepareSpec, out: Path, origin: Origin, workers: int) -> Manifest:
    progress = _begin_or_resume(out, origin)
    if progress.tokenizer is None:
        progress = replace(progress, tokenizer=_place_tokenizer(spec, out, origin))
        save(progress, out)
    progress = _write_splits(spec, out, progress, workers)
    assert progress.tokenizer is not None
    manifest = Manifest(FORMAT, origin, progress.tokenizer, progress.train.shards, progress.val.shards)
    save(manifest, out)
    (out / PROGRESS).unlink()
    return manifest


def prepare(spec: PrepareSpec, workers: int = 1) -> Manifest:
    """Makes, goes on with, or finds finished the folder `spec.out`; returns its manifest. Raises `UserError`.

    A finished folder of the same origin is left as it is. An unfinished one is gone on with from its last whole shard. One of
    another origin is refused, naming the fields that differ. With more than one worker, processes are started that import the
    caller's main module (as `multiprocessing` does it when spawning), so that one should be cheap to import.
    """
    for option, value, least in (
        ("--workers", workers, 1),
        ("--shard-tokens", spec.shard_tokens, 1),
        ("--val-docs", spec.val_docs, 0 if spec.val_source else 1),
        ("--vocab-size", spec.vocab_size, 0),
        ("--max-tokens", spec.max_tokens, 0),
    ):
        if value < least:
            raise UserError(f"{option} {value}: expected at least {least}")
    if spec.shard_tokens > MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {spec.shard_tokens}: expected at most {MAX_SHARD_TOKENS}")
    out, origin = Path(spec.out), origin_of(spec)
    if manifest := _finished(out, origin):  # before the lock: a finished folder may be read-only
        return manifest
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            return _finished(out, origin) or _make(spec, out, origin, workers)
    except OSError as error:  # no space, no permission, a file where the folder should be
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from error


def fetch_golf(spec: PrepareSpec, train_shards: int) -> Dataset:
    """Fetches the published shards and tokenizer of `golf[:spV]` into `spec.out` and opens them. Raises `UserError`.

    V is the vocabulary size, at most `spec.vocab_size`; where the source does not name it, just that, or 1024.
    """
    named = spec.source.removeprefix("golf").removeprefix(":")
    if named and not (named.startswith("sp") and named[2:].isdecimal()):
        raise UserError(f"--source {spec.source}: expected golf or golf:spV with a vocabulary size V, such as golf:sp1024")
    vocab_size = int(named[2:]) if named else spec.vocab_size or _GOLF_VOCAB_SIZE
    check_size(spec, f"--source {spec.source}", vocab_size)
    plain = PrepareSpec(spec.source, spec.out, vocab_size=spec.vocab_size)
    differing = [key for key, value in asdict(plain).items() if getattr(spec, key) != value]
    if differing:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in differing)
        raise UserError(f"--source {spec.source} is already tokens; it takes no {options} but its own")
    print(f"{spec.out}: fetching the published shards of {vocab_size} tokens", file=sys.stderr, flush=True)
    download_golf(Path(spec.out), vocab_size=vocab_size, train_shards=train_shards)
    return open_dataset(spec.out, vocab_size)


# ---------------------------------------------------------------------------------------------- the command


def _summary(out: str, manifest: Manifest) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    for split, entries in (("train", manifest.train), ("val", manifest.val)):
        sums = {key: sum(getattr(entry, key) for entry in entries) for key in ("tokens", "documents", "bytes")}
        totals[split] = {"shards": len(entries), **sums}
    return {"dir": out, "tokenizer": asdict(manifest.tokenizer), **totals}


def _golf_summary(out: str, data: Dataset) -> dict[str, Any]:
    totals = {name: {"shards": len(s.shards), "tokens": len(s)} for name, s in (("train", data.train), ("val", data.val))}
    return {"dir": out, "tokenizer": asdict(_tokenizer_entry(data.tokenizer)), **totals}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status. Raises `UserError`."""
    argv = cli.expand_json(argv)
    kind: Any = VerifyArguments if any(a.split("=")[0] == "--verify" for a in argv) else Arguments
    arguments = tyro.cli(kind, args=argv, prog=cli.command(COMMAND), config=(tyro.conf.FlagConversionOff,))
    if isinstance(arguments, VerifyArguments):
        print(f"{arguments.verify}: reading every file back", file=sys.stderr, flush=True)
        summary = _summary(arguments.verify, verify(arguments.verify))
    else:
        spec = PrepareSpec(**{key: getattr(arguments, key) for key in PrepareSpec.__dataclass_fields__})
        if spec.source == "golf" or spec.source.startswith("golf:"):
            summary = _golf_summary(spec.out, fetch_golf(spec, arguments.train_shards))
        else:
            summary = _summary(spec.out, prepare(spec, arguments.workers))
    if arguments.json != "-":
        for split in ("train", "val"):
            print(f"{summary['dir']}: {split}: " + ", ".join(f"{name} {count:,}" for name, count in summary[split].items()))
        file, vocab_size = summary["tokenizer"]["file"], summary["tokenizer"]["vocab_size"]
        print(f"{summary['dir']}: tokenizer: {file}, {vocab_size} tokens")
    cli.write_json(summary, arguments.json)
    return 0


if __name__ == "__main__":
    cli.run(main)
