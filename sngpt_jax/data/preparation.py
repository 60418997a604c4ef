"""Text to token shards.

Documents of the source, or all of `val_source`, are the validation split, and the rest are the
training split (`sngpt_jax.data.split`). Training leaves out what validation has, too. A document is
its BOS token and its text's tokens, and full shards cut the sequence anywhere. So the files depend
only on the text, the tokenizer and the shard size: the executor, the number of workers and
interruptions do not matter.
"""

import logging
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.terminal import progress_reporter
from sngpt_jax.data import overlap
from sngpt_jax.data.corpus import count_parts, imported, say_left_out, text_bytes
from sngpt_jax.data.encode import Encoded, Encoder, cut_chunks, encoder
from sngpt_jax.data.manifest import (
    CHANGED,
    FORMAT,
    PROGRESS,
    Manifest,
    Origin,
    Separation,
    SplitJournal,
    check_sha256,
    lost_share,
    save,
)
from sngpt_jax.data.parts import Parts, Submitted
from sngpt_jax.data.shards import MAX_SHARD_TOKENS, TokenStream, open_entries, write_hashed
from sngpt_jax.data.spec import COMMAND, PrepareSpec, command_line, option, origin_of, split_of
from sngpt_jax.data.split import Name
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from sngpt_jax.data.writer import PARTS, SplitWriter, begin_or_resume, finished, held

logger = logging.getLogger("sngpt_jax")

# what tokenizes: processes of this command, or datatrove's tasks
Executor = Literal["processes", "local", "slurm"]


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


class _Preparation:
    """A preparation at work in the folder that it holds."""

    def __init__(self, spec: PrepareSpec, origin: Origin, workers: int) -> None:
        self.spec, self.origin, self.workers, self.out = spec, origin, workers, Path(spec.out)
        self.journal = begin_or_resume(self.out, origin)
        # before anything is written, to find a source that is too small
        self.split = split_of(spec, origin)
        if self.journal.tokenizer is None:
            self._advance(tokenizer=self._place_tokenizer().entry())
        assert self.journal.tokenizer is not None
        self.entry = self.journal.tokenizer
        self.tokenizer = self.out / self.entry.file
        check_sha256(self.tokenizer, self.entry.sha256, CHANGED)
        for text in filter(None, (spec.source, spec.val_source)):
            say_left_out(text)

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
        texts = (text for _, text in self.split.texts("train"))
        if not spec.allow_overlap:
            val = {_digest(text) for _, text in self.split.texts("val")}
            texts = (text for text in texts if _digest(text) not in val)
        path, rule = out / "tokenizer.model", spec.normalization
        return train_sentencepiece(texts, path, vocab_size=size, normalization=rule)

    def run(self, executor: Executor) -> Manifest | Submitted:
        """Writes what is missing of the folder; with `slurm` submits jobs that will."""
        executors: Any = None
        if executor != "processes":
            from sngpt_jax.data import executor as executors  # needs the package datatrove
        parts = None
        if self.split.cut:  # a part would be encoded whole
            executors = None
        elif not self.journal.train.finished and (executors or (self.out / PARTS).is_dir()):
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
            self._write_split("val", encode, parts if self.split.below else None)
            self._write_split("train", encode, parts)
        shutil.rmtree(self.out / PARTS, ignore_errors=True)
        train, val = self.journal.train, self.journal.val
        kept = [
            overlap.keep_hashes(self.out, name, self._hashes(name)) for name in ("train", "val")
        ]
        separation = Separation(train.dropped, self.split.cut, *kept)
        manifest = Manifest(FORMAT, self.origin, self.entry, train.shards, val.shards, separation)
        save(manifest, self.out)
        (self.out / PROGRESS).unlink()
        return manifest

    def _source(self, name: Name) -> str:
        """The source of a split's documents."""
        return (name == "val" and self.spec.val_source) or self.spec.source

    def _hashes(self, name: Name) -> np.ndarray:
        """The hashes of a finished split's documents."""
        shards = open_entries(self.out, getattr(self.journal, name).shards)
        stream = TokenStream(tuple(shards), self.entry.vocab_size)
        return overlap.document_hashes(stream, self.entry.bos_id)

    @cached_property
    def _held_out(self) -> np.ndarray:
        """The sorted hashes of the documents that training leaves out."""
        return np.sort(() if self.spec.allow_overlap else self._hashes("val"))

    def _encoded(
        self, name: Name, encode: Encoder, parts: Parts | None, start: int, texts: Any
    ) -> Iterator[Encoded]:
        """The split's documents from number `start` on, in chunks."""
        if not parts:
            yield from encode(self._source(name), cut_chunks(texts))
            return
        for chunk in parts.read(start):
            yield [x for n, x in enumerate(chunk, start) if self.split.takes(name, n)]
            start += len(chunk)

    def _write_split(self, name: Name, encode: Encoder, parts: Parts | None) -> None:
        """Writes what is missing of a split, from the encoded `parts` if given."""
        spec, split, done = self.spec, self.split, getattr(self.journal, name)
        if done.finished:
            return
        source = self._source(name)
        limit = spec.max_tokens or None if name == "train" else None
        size: float = text_bytes(source)
        if name == "train" and not spec.val_source:
            size -= sum(entry.source_bytes or 0 for entry in self.journal.val.shards)
        elif split.below or split.cut:
            size *= self.origin.val_fraction
        table = load_tokenizer(self.tokenizer).token_bytes()
        which, read = (self.out, name, spec.shard_tokens, table, done), 0  # bytes
        writer = SplitWriter(*which, lambda reached: self._advance(**{name: reached}), limit)

        def counted() -> Iterator[tuple[int, str]]:
            nonlocal read
            for number, text in split.texts(name, start):
                read += len(text.encode())
                yield number, text

        start = split.number(name, done.documents + done.dropped)
        holds_text = any(entry.text_bytes for entry in done.shards)
        report = progress_reporter(f"{self.out}: {name}")
        for chunk in self._encoded(name, encode, parts, start, counted()):
            for document in chunk:
                holds_text |= document.bytes.text > 0
                if writer.full:
                    break
                if name == "train" and overlap.is_among(document.tokens[1:], self._held_out):
                    writer.drop()
                else:
                    writer.append(document)
            share = read / size if size > 0 else 0.0
            if split.first and name == "val":
                share = writer.documents / split.first
            elif limit:
                share = max(share, writer.tokens / limit)
            # The split is whole only after its last shard is written.
            report(min(share, 0.999), bool(share), f"{writer.tokens:,} tokens")
            if writer.full:
                break
        if not writer.tokens:
            raise UserError(
                f"--source {spec.source}: the validation text has all its training documents, too;"
                " give other text, or another --out and --allow-overlap"
            )
        if not holds_text:
            problem = f"the {name} documents of {source} encode to no text"
            raise UserError(f"{self.tokenizer}: {problem}; give another tokenizer or text")
        writer.finish()
        report(1, 1, f"{writer.tokens:,} tokens")
        if about := lossiness(writer.reached):
            logger.warning(f"{self.out}: {name}: {about}")


def lossiness(split: SplitJournal) -> str:
    """How much of a split's text its tokens do not keep, with an example; empty: they keep all."""
    lossy = sum(entry.lossy_documents or 0 for entry in split.shards)
    if not lossy:
        return ""
    example = f", such as: {split.example}" if split.example else ""
    documents = f"{lossy:,} of {split.documents:,} documents are not kept exactly"
    return f"{documents}; {lost_share(split.shards):.2%} of the text's bytes are lost{example}"


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
        ("--val-docs", spec.val_docs, 0),
        ("--val-fraction", spec.val_fraction, 0),
        ("--vocab-size", spec.vocab_size, 0),
        ("--max-tokens", spec.max_tokens, 0),
    ):
        if value < least:
            raise UserError(f"{name} {value}: expected at least {least}")
    rules = {name: getattr(spec, name) for name in ("val_source", "val_docs", "val_fraction")}
    if len(given := [option(name) for name, value in rules.items() if value]) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other; give one")
    if not spec.val_fraction < 1:  # NaN is not
        raise UserError(f"--val-fraction {spec.val_fraction}: expected less than 1")
    if spec.split_seed and (spec.val_source or spec.val_docs):
        raise UserError(f"--split-seed draws documents, which {given[0]} does not; leave one out")
    if spec.shard_tokens > MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {spec.shard_tokens}: expected at most {MAX_SHARD_TOKENS}")
    out = Path(spec.out)
    for text in map(Path, filter(None, (spec.source, spec.val_source))):
        if text.is_dir() and out.resolve() == text.resolve():  # below it, it is no text
            raise UserError(
                f"--out {out}: it is the folder of the text; give another, or one in it"
            )
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
