"""Text to token shards.

The documents keep their order: the first `val_docs` (or all of `val_source`) are the validation
split, the rest the training split. Each is its BOS token and its text's tokens, without an end
token, and shards cut the sequence wherever they are full. So the files depend on the text, the
tokenizer and the shard size alone, not on the executor, the number of workers or how often the
preparation was killed and started again.
"""

import itertools
import logging
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.terminal import format_duration, progress_reporter
from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.data.corpus import count_parts, documents, download_golf, imported, text_bytes
from sngpt_jax.data.encode import cut_chunks, encoder
from sngpt_jax.data.folder import PARTS, begin_or_resume, finished, locked
from sngpt_jax.data.manifest import (
    FORMAT,
    PROGRESS,
    Manifest,
    Origin,
    Progress,
    TokenizerEntry,
    save,
)
from sngpt_jax.data.parts import Parts, Submitted
from sngpt_jax.data.shards import MAX_SHARD_TOKENS, Dataset, open_dataset, write_hashed
from sngpt_jax.data.spec import COMMAND, PrepareSpec, check_size, command_line, origin_of
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from sngpt_jax.data.writer import SplitWriter

logger = logging.getLogger("sngpt_jax")

_GOLF_VOCAB_SIZE = 1024


# what tokenizes: processes of this command, or datatrove's tasks
Executor = Literal["processes", "local", "slurm"]


# ---------------------------------------------------------------------------------------------- what is seen of it


class _Reading:
    """A split's documents as they are read, and what share of its bytes they are."""

    def __init__(self, texts: Iterator[str], size: int) -> None:
        """`size`: the bytes of all documents in UTF-8; 0: not known."""
        self._texts, self._size, self._bytes = texts, size, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self._bytes += len(text.encode()) if self._size else 0
            yield text

    @property
    def share(self) -> float:
        """Somewhat ahead of what is written; 0 where it is not known."""
        return self._bytes / self._size if self._size else 0.0


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
        f"--source {spec.source} holds {held_out} documents and --val-docs {spec.val_docs} leaves"
        " none to train on; lower --val-docs or give --val-source",
    )


def _val_documents(spec: PrepareSpec) -> Iterator[str]:
    if spec.val_source:
        return _nonempty(
            documents(spec.val_source), f"--val-source {spec.val_source} holds no documents"
        )
    return itertools.islice(documents(spec.source), spec.val_docs)


# ---------------------------------------------------------------------------------------------- the folder


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    return TokenizerEntry(
        tokenizer.path.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos_id
    )


def _place_tokenizer(spec: PrepareSpec, out: Path, origin: Origin) -> TokenizerEntry:
    if spec.tokenizer == "train":
        path = out / "tokenizer.model"
        logger.info(f"{out}: learning a tokenizer of {origin.vocab_size:,} tokens")
        start, texts = time.monotonic(), _train_documents(spec)
        tokenizer = train_sentencepiece(
            texts, path, vocab_size=origin.vocab_size, normalization=spec.normalization
        )
        logger.info(f"{out}: tokenizer learnt in {format_duration(time.monotonic() - start)}")
    else:
        path = out / f"tokenizer{Path(spec.tokenizer).suffix}"
        write_hashed(path, Path(spec.tokenizer).read_bytes())
        tokenizer = load_tokenizer(path)
    return tokenizer_entry(tokenizer)


def _write_splits(
    spec: PrepareSpec,
    progress: Progress,
    tokenizer: Path,
    texts: dict[str, Iterator[str]],
    workers: int,
    parts: Parts | None,
) -> Progress:
    """Writes what is missing of the splits of `texts`, whose training documents are in `parts`,
    encoded, if that is given.
    """
    out, token_bytes = Path(spec.out), load_tokenizer(tokenizer).token_bytes()
    sources = {"val": spec.val_source or spec.source, "train": spec.source}
    held_out = 0 if spec.val_source else spec.val_docs

    with encoder(tokenizer, workers) as encode:
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
                out,
                split,
                spec.shard_tokens,
                limit=limit,
                token_bytes=token_bytes,
                progress=done,
                on_shard=on_shard,
            )
            first = done.documents + (held_out if split == "train" else 0)
            before = (
                sum(entry.bytes for entry in progress.val.shards)
                if held_out and split == "train"
                else 0
            )
            reading = _Reading(texts[split], max(text_bytes(sources[split]) - before, 0))
            report = progress_reporter(f"{out}: {split}")
            if parts and split == "train":
                chunks = parts.read(first)
            else:
                chunks = encode(
                    sources[split],
                    cut_chunks(itertools.islice(reading, done.documents, None), first + 1),
                )
            for chunk in chunks:
                for tokens, extra in chunk:
                    writer.append(tokens, extra)
                share = (
                    writer.documents / held_out if held_out and split == "val" else reading.share
                )
                share = max(share, writer.tokens / limit) if limit else share
                # whole once it is written
                report(min(share, 0.999), bool(share), f"{writer.tokens:,} tokens")
                if writer.full:
                    break
            writer.finish()
            report(1, 1, f"{writer.tokens:,} tokens")
    return progress


def _executors() -> Any:
    imported("datatrove", "--executor")
    from sngpt_jax.data import executor  # needs that package

    return executor


def _make(
    spec: PrepareSpec, out: Path, origin: Origin, workers: int, executor: Executor
) -> Manifest | Submitted:
    executors: Any = None if executor == "processes" else _executors()
    if executor == "slurm":
        executors.check_quoting(out)
    progress = begin_or_resume(out, origin)
    if progress.tokenizer is None:
        progress = replace(progress, tokenizer=_place_tokenizer(spec, out, origin))
        save(progress, out)
    entry = progress.tokenizer
    assert entry is not None
    tokenizer, found = out / entry.file, file_sha256(out / entry.file, UserError)
    if found != entry.sha256:
        raise UserError(
            f"{tokenizer}: changed since the preparation began: expected SHA-256 {entry.sha256},"
            f" found {found}"
        )
    # Both are opened before anything is written, so that a source that is too small is known at
    # once.
    texts = {"train": _train_documents(spec), "val": _val_documents(spec)}
    parts = None
    if not progress.train.finished and (executors or (out / PARTS).is_dir()):
        parts = Parts(out / PARTS, spec.source, count_parts(spec.source), origin, tokenizer, entry)
        if executor == "slurm":
            here = ("--executor", "local", "--workers", "1")  # finds every part encoded
            return executors.submit(
                parts, workers, [sys.executable, "-m", COMMAND, *command_line(spec), *here]
            )
        if executors:
            report = progress_reporter(f"{out}: encoding")
            executors.encode_here(
                parts,
                workers,
                lambda what, documents, tokens: report(0, 0, f"{what}, {tokens:,} tokens"),
            )
        elif parts.left():  # not all there: tokenized here
            parts = None
    progress = _write_splits(spec, progress, tokenizer, texts, workers, parts)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    manifest = Manifest(FORMAT, origin, entry, progress.train.shards, progress.val.shards)
    save(manifest, out)
    (out / PROGRESS).unlink()
    return manifest


def prepare(spec: PrepareSpec, workers: int = 1) -> Manifest:
    """Makes, goes on with, or finds finished the folder `spec.out`; returns its manifest. Raises
    `UserError`.

    A finished folder of the same origin is left as it is. An unfinished one is gone on with from
    its last whole shard. One of another origin is refused, naming the fields that differ. With
    more than one worker, processes are started that import the caller's main module (as
    `multiprocessing` does it when spawning), so that one should be cheap to import.
    """
    manifest = prepare_on(spec, workers, "processes")
    assert isinstance(manifest, Manifest)
    return manifest


def prepare_on(spec: PrepareSpec, workers: int, executor: Executor) -> Manifest | Submitted:
    """As `prepare`, on any of the executors; the files do not depend on it. `slurm` only submits
    jobs that will make them.
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
    if manifest := finished(out, origin):  # before the lock: a finished folder may be read-only
        return manifest
    with locked(out):
        return finished(out, origin) or _make(spec, out, origin, workers, executor)


def fetch_golf(spec: PrepareSpec, train_shards: int) -> Dataset:
    """Fetches the published shards and tokenizer of `golf[:spV]` into `spec.out` and opens them.
    Raises `UserError`.

    V is the vocabulary size, at most `spec.vocab_size`; where the source does not name it, just
    that, or 1024.
    """
    named = spec.source.removeprefix("golf").removeprefix(":")
    if named and not (named.startswith("sp") and named[2:].isdecimal()):
        raise UserError(
            f"--source {spec.source}: expected golf or golf:spV with a vocabulary size V, such as"
            " golf:sp1024"
        )
    vocab_size = int(named[2:]) if named else spec.vocab_size or _GOLF_VOCAB_SIZE
    check_size(spec, f"--source {spec.source}", vocab_size)
    plain = PrepareSpec(spec.source, spec.out, vocab_size=spec.vocab_size)
    differing = [key for key, value in asdict(plain).items() if getattr(spec, key) != value]
    if differing:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in differing)
        raise UserError(
            f"--source {spec.source} is already tokens; it takes no {options} but its own"
        )
    logger.info(f"{spec.out}: fetching the published shards of {vocab_size:,} tokens")
    download_golf(Path(spec.out), vocab_size=vocab_size, train_shards=train_shards)
    return open_dataset(spec.out, vocab_size)
