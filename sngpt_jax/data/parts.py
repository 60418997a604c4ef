"""A source's documents encoded part by part, by any number of machines, and read again in their
order.

A part is a run of the source's files (`corpus.count_parts`), encoded by one process into a folder
of its own: shards and a journal, as a whole preparation's. A part does not know which of its
documents are held out, so that it has all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256, inside
from sngpt_jax.data.corpus import documents
from sngpt_jax.data.encode import Encoded, cut_chunks, encoder
from sngpt_jax.data.folder import begin_or_resume, locked, refuse_other
from sngpt_jax.data.manifest import (
    PROGRESS,
    DataError,
    Origin,
    ShardEntry,
    SplitProgress,
    TokenizerEntry,
    load_progress,
    save,
)
from sngpt_jax.data.shards import TokenStream, open_entries
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.data.writer import SplitWriter

# in a part's shard: seconds of work, which is what a killed worker loses
_SHARD_TOKENS = 10_000_000
_CHUNK_DOCUMENTS = 256  # read at a time


@dataclass(frozen=True)
class Submitted:
    """What a cluster was given to do."""

    parts: int  # tasks of the array job
    array_job: str  # id of the job that encodes them; empty where all are encoded
    merge_job: str  # id of the job that then makes the shards


@dataclass(frozen=True)
class Parts:
    """The parts of one preparation's source, in `directory`."""

    directory: Path
    source: str
    count: int
    origin: Origin  # of the preparation
    tokenizer: Path
    tokenizer_entry: TokenizerEntry

    def folder(self, part: int) -> Path:
        """Where part `part` is; named after the number of parts too, which a Hugging Face data set
        may change.
        """
        return self.directory / f"{part:05d}-of-{self.count:05d}"

    def reached(self, part: int) -> SplitProgress:
        """How far part `part` is encoded. Raises `DataError` where its journal is damaged or
        another preparation's.
        """
        folder = self.folder(part)
        if not (folder / PROGRESS).is_file():
            return SplitProgress()
        progress = load_progress(folder)
        refuse_other(folder, progress.origin, self.origin)
        return progress.train

    def left(self) -> list[int]:
        """The parts to encode yet, in order: those not whole. Where the ones before hold
        `max_tokens`, no more are needed.
        """
        result: list[int] = []
        entries: list[ShardEntry] = []
        for part in range(self.count):
            if self._enough(entries):
                break
            reached = self.reached(part)
            if not reached.finished:
                result.append(part)
            entries += reached.shards
        return result

    def _enough(self, entries: Sequence[ShardEntry]) -> bool:
        """Whether `entries`, all of them or only some that come first, are certain to hold
        `max_tokens` training tokens.
        """
        tokens = begun = 0
        for entry in entries:
            if begun > self.origin.val_docs:  # the first training document began before this shard
                tokens += entry.tokens
            begun += entry.documents
        return 0 < self.origin.max_tokens <= tokens

    def _reached_now(self, known: Sequence[SplitProgress]) -> list[SplitProgress]:
        """How far parts 0, 1, … are encoded, of which `known` was true earlier: whole ones are not
        read again.
        """
        return [
            progress if progress.finished else self.reached(part)
            for part, progress in enumerate(known)
        ]

    def encode(self, part: int) -> None:
        """Encodes part `part`, or what is missing of it. Raises `UserError`; whole shards are kept
        then, as in a kill.
        """
        folder = self.folder(part)
        with locked(folder):
            progress = begin_or_resume(folder, self.origin)
            before = self._reached_now([SplitProgress()] * part if self.origin.max_tokens else [])
            if progress.train.finished or self._enough(
                [entry for earlier in before for entry in earlier.shards]
            ):
                return
            tokenizer = load_tokenizer(self.tokenizer)
            if tokenizer.sha256 != self.tokenizer_entry.sha256:
                raise UserError(f"{self.tokenizer}: changed since the preparation began")

            def on_shard(reached: SplitProgress) -> None:
                nonlocal progress
                progress = replace(progress, train=reached)
                save(progress, folder)

            writer = SplitWriter(
                folder,
                "train",
                _SHARD_TOKENS,
                limit=None,
                token_bytes=tokenizer.token_bytes(),
                progress=progress.train,
                on_shard=on_shard,
            )
            name = f"{self.source}, part {part + 1} of {self.count}"
            texts = islice(documents(self.source, part, self.count), writer.documents, None)
            with encoder(self.tokenizer, workers=1) as encode:
                for chunk in encode(name, cut_chunks(texts, writer.documents + 1)):
                    shards = len(writer.progress.shards)
                    for tokens, extra in chunk:
                        writer.append(tokens, extra)
                    if len(writer.progress.shards) > shards:
                        # the parts before may be in work at the same time
                        before = self._reached_now(before)
                    if self._enough(
                        [
                            entry
                            for reached in (*before, writer.progress)
                            for entry in reached.shards
                        ]
                    ):
                        break
            writer.finish()

    def read(self, first: int) -> Iterator[Encoded]:
        """The source's documents from number `first` on (from 0), held-out ones included, in their
        order, in chunks.

        Raises `DataError` at a part that is not whole or is damaged.
        """
        for part in range(self.count):
            reached = self.reached(part)
            if not reached.finished:
                raise DataError(
                    f"{self.folder(part)}: not encoded to its end; run the same command again"
                )
            if reached.documents > first:
                yield from self._read_part(self.folder(part), reached, first)
            first = max(0, first - reached.documents)

    def _read_part(self, folder: Path, reached: SplitProgress, first: int) -> Iterator[Encoded]:
        remedy = f"delete {folder} and run the same command again"
        for file in [entry for shard in reached.shards for entry in (shard, shard.extra) if entry]:
            path = inside(folder, file.name, DataError)
            if not path.is_file():
                raise DataError(f"{path}: missing; {remedy}")
            if (found := file_sha256(path, DataError)) != file.sha256:
                raise DataError(
                    f"{path}: damaged: expected SHA-256 {file.sha256}, found {found}; {remedy}"
                )
        stream = TokenStream(
            tuple(open_entries(folder, reached.shards)), self.tokenizer_entry.vocab_size
        )
        edges, end = [], 0
        # a document's one BOS is its first token: no text encodes to it
        for shard in stream.shards:
            edges.append(end + np.flatnonzero(shard.tokens == self.tokenizer_entry.bos_id))
            end += len(shard.tokens)
        begins = np.concatenate(edges).tolist()
        if len(begins) != reached.documents:
            raise DataError(
                f"{folder}: expected {reached.documents} documents, found {len(begins)}; {remedy}"
            )
        spans = pairwise([*begins[first:], end])
        while chunk := list(islice(spans, _CHUNK_DOCUMENTS)):
            yield [(stream.take(a, b - a), stream.extra(a, b) - np.array([a, 0])) for a, b in chunk]
