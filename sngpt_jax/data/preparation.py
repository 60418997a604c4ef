"""Text to token shards.

The first `val_docs` documents (or all of `val_source`) are the validation split, the rest are the
training split. A document is its BOS token and its text's tokens, and full shards cut the sequence
anywhere. So the files depend only on the text, the tokenizer and the shard size: the executor, the
number of workers and interruptions do not matter.
"""

import logging
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.terminal import progress_reporter
from sngpt_jax.data.corpus import count_parts, documents, imported, text_bytes
from sngpt_jax.data.encode import Encoder, cut_chunks, encoder
from sngpt_jax.data.manifest import CHANGED, FORMAT, PROGRESS, Manifest, Origin, check_sha256, save
from sngpt_jax.data.parts import Parts, Submitted
from sngpt_jax.data.shards import MAX_SHARD_TOKENS, write_hashed
from sngpt_jax.data.spec import COMMAND, PrepareSpec, command_line, origin_of
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from sngpt_jax.data.writer import PARTS, SplitWriter, begin_or_resume, finished, held

logger = logging.getLogger("sngpt_jax")

# what tokenizes: processes of this command, or datatrove's tasks
Executor = Literal["processes", "local", "slurm"]


def _nonempty(texts: Iterator[str], message: str) -> Iterator[str]:
    """`texts`. Raises `UserError(message)` if there are none."""
    first = next(texts, None)
    if first is None:
        raise UserError(message)
    return chain([first], texts)


def _open_texts(spec: PrepareSpec) -> dict[str, Iterator[str]]:
    """The documents of each split, which may not be empty."""
    source, val_source = spec.source, spec.val_source
    train, empty = documents(source), f"--source {source} holds no documents"
    if val_source:
        val = _nonempty(documents(val_source), f"--val-source {val_source} holds no documents")
    else:
        val = islice(documents(source), spec.val_docs)
        held_out = sum(1 for _ in islice(train, spec.val_docs))
        empty = (
            f"--source {source} holds {held_out} documents and --val-docs {spec.val_docs} leaves"
            " none to train on; lower --val-docs or give --val-source"
        )
    return {"val": val, "train": _nonempty(train, empty)}


class _Preparation:
    """A preparation at work in the folder that it holds."""

    def __init__(self, spec: PrepareSpec, origin: Origin, workers: int) -> None:
        self.spec, self.origin, self.workers, self.out = spec, origin, workers, Path(spec.out)
        self.journal = begin_or_resume(self.out, origin)
        if self.journal.tokenizer is None:
            self._advance(tokenizer=self._place_tokenizer().entry())
        assert self.journal.tokenizer is not None
        self.entry = self.journal.tokenizer
        self.tokenizer = self.out / self.entry.file
        check_sha256(self.tokenizer, self.entry.sha256, CHANGED)
        # opened before anything is written, to find a source that is too small
        self.texts = _open_texts(spec)

    def _advance(self, **changes: Any) -> None:
        """Records changed fields of the journal."""
        self.journal = replace(self.journal, **changes)
        save(self.journal, self.out)

    def _place_tokenizer(self) -> Tokenizer:
        """Copies the given tokenizer into the folder, or learns one there."""
        spec, out = self.spec, self.out
        if spec.tokenizer != "train":
            path = out / f"tokenizer{Path(spec.tokenizer).suffix}"
            write_hashed(path, Path(spec.tokenizer).read_bytes())
            return load_tokenizer(path)
        size = self.origin.vocab_size
        logger.info(f"{out}: learning a tokenizer of {size:,} tokens")
        texts, path = _open_texts(spec)["train"], out / "tokenizer.model"
        rule = spec.normalization
        return train_sentencepiece(texts, path, vocab_size=size, normalization=rule)

    def run(self, executor: Executor) -> Manifest | Submitted:
        """Writes what is missing of the folder; with `slurm` submits jobs that will."""
        executors: Any = None
        if executor != "processes":
            from sngpt_jax.data import executor as executors  # needs the package datatrove
        parts = None
        if not self.journal.train.finished and (executors or (self.out / PARTS).is_dir()):
            source, which = self.spec.source, (self.origin, self.tokenizer, self.entry)
            parts = Parts(self.out / PARTS, source, count_parts(source), *which)
            if executor == "slurm":
                here = ("--executor", "local", "--workers", "1")  # finds every part encoded
                merge = [sys.executable, "-m", COMMAND, *command_line(self.spec), *here]
                return executors.submit(parts, self.workers, merge)
            if executors:
                shown = progress_reporter(f"{self.out}: encoding")
                executors.encode_here(parts, self.workers, shown)
            elif parts.left():  # incomplete parts are ignored
                parts = None
        with encoder(self.tokenizer, self.workers) as encode:
            self._write_split("val", encode, None)
            self._write_split("train", encode, parts)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)
        train, val = self.journal.train.shards, self.journal.val.shards
        manifest = Manifest(FORMAT, self.origin, self.entry, train, val)
        save(manifest, self.out)
        (self.out / PROGRESS).unlink()
        return manifest

    def _write_split(self, split: str, encode: Encoder, parts: Parts | None) -> None:
        """Writes what is missing of a split, from the encoded `parts` if given."""
        spec, done = self.spec, getattr(self.journal, split)
        if done.finished:
            return
        held_out = 0 if spec.val_source else spec.val_docs
        source, limit, skipped = spec.val_source or spec.source, None, 0
        if split == "train":
            source, limit, skipped = spec.source, spec.max_tokens or None, held_out
        size = text_bytes(source)
        if skipped:
            size -= sum(entry.golf_bytes for entry in self.journal.val.shards)
        table = load_tokenizer(self.tokenizer).token_bytes()
        which, read = (self.out, split, spec.shard_tokens, table, done), 0  # bytes
        writer = SplitWriter(*which, lambda reached: self._advance(**{split: reached}), limit)

        def counted() -> Iterator[str]:
            nonlocal read
            for text in self.texts[split]:
                read += len(text.encode())
                yield text

        first = skipped + done.documents
        texts = islice(counted(), done.documents, None)
        chunks = parts.read(first) if parts else encode(source, cut_chunks(texts, first + 1))
        report = progress_reporter(f"{self.out}: {split}")
        for chunk in chunks:
            for document in chunk:
                writer.append(document)
            share = read / size if size > 0 else 0.0
            if held_out and split == "val":
                share = writer.documents / held_out
            elif limit:
                share = max(share, writer.tokens / limit)
            # The split is whole only after its last shard is written.
            report(min(share, 0.999), bool(share), f"{writer.tokens:,} tokens")
            if writer.full:
                break
        writer.finish()
        report(1, 1, f"{writer.tokens:,} tokens")


def prepare(spec: PrepareSpec, workers: int = 1) -> Manifest:
    """Makes or resumes the folder `spec.out`; returns its manifest. Raises `UserError`.

    A finished folder of the same origin stays as it is. An unfinished one resumes after its last
    whole shard. A folder of another origin is refused with the fields that differ. With more than
    one worker, `multiprocessing` starts processes that import the caller's main module, which
    should be cheap to import.
    """
    manifest = prepare_on(spec, workers, "processes")
    assert isinstance(manifest, Manifest)
    return manifest


def prepare_on(spec: PrepareSpec, workers: int, executor: Executor) -> Manifest | Submitted:
    """As `prepare`, on any executor. `slurm` only submits jobs."""
    for name, value, least in (
        ("--workers", workers, 1),
        ("--shard-tokens", spec.shard_tokens, 1),
        ("--val-docs", spec.val_docs, 0 if spec.val_source else 1),
        ("--vocab-size", spec.vocab_size, 0),
        ("--max-tokens", spec.max_tokens, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value}: expected at least {least}")
    if spec.shard_tokens > MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {spec.shard_tokens}: expected at most {MAX_SHARD_TOKENS}")
    out = Path(spec.out)
    # datatrove writes paths into a job's script as they are.
    strange = re.search(r"""[\s"'`$&|;<>()*?\[\]{}!\\]""", str(out.absolute()))
    if executor == "slurm" and strange:
        problem = f"with --executor slurm its path may not hold {strange[0]!r}; give another"
        raise UserError(f"--out {out.absolute()}: {problem}")
    origin = origin_of(spec)
    if manifest := finished(out, origin):  # before the lock: a finished folder may be read-only
        return manifest
    if executor != "processes":
        imported("datatrove", "--executor")
    with held(out):
        return finished(out, origin) or _Preparation(spec, origin, workers).run(executor)
