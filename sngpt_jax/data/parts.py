"""A source's documents, encoded part by part by any number of machines, and read again in order.

A part is a run of the source's files. One process encodes it into a folder of its own with shards
and a journal, as for a whole preparation. It holds the held-out documents too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from sngpt_jax.base.untrusted import inside
from sngpt_jax.data.corpus import Reading, documents
from sngpt_jax.data.encode import Encoded, cut_chunks, encoder
from sngpt_jax.data.manifest import (
    CHANGED,
    PROGRESS,
    DataError,
    Origin,
    SplitJournal,
    TokenizerEntry,
    check_sha256,
    load_journal,
    save,
)
from sngpt_jax.data.shards import TokenStream, moved, open_entries
from sngpt_jax.data.tokenizer import counted, load_tokenizer
from sngpt_jax.data.writer import SplitWriter, begin_or_resume, held, refuse_other

_SHARD_TOKENS = 10_000_000  # of a part's shard; a killed worker loses as much
_CHUNK_DOCUMENTS = 256  # read at a time


@dataclass(frozen=True)
class Submitted:
    """Jobs that a cluster was given."""

    parts: int  # tasks of the array job
    array_job: str  # id of the job that encodes the parts; empty if all are encoded
    merge_job: str  # id of the job that then makes the shards


@dataclass(frozen=True)
class Parts:
    """The parts of one preparation's source, in `directory`."""

    directory: Path  # has a folder per part
    source: str
    count: int  # of parts
    origin: Origin  # of the preparation
    tokenizer: Path  # in the preparation's folder
    tokenizer_entry: TokenizerEntry

    def folder(self, part: int) -> Path:
        """The folder of part `part`, named by the number of parts too: a hub's may change."""
        return self.directory / f"{part:05d}-of-{self.count:05d}"

    def reached(self, part: int) -> SplitJournal:
        """How far part `part` is encoded. Raises `UserError` for another preparation's."""
        folder = self.folder(part)
        if not (folder / PROGRESS).is_file():
            return SplitJournal()
        journal = load_journal(folder)
        refuse_other(folder, journal.origin, self.origin)
        return journal.train

    def left(self) -> list[int]:
        """The parts that are still to encode, up to those that hold `max_tokens`."""
        result: list[int] = []
        before: list[SplitJournal] = []
        for part in range(self.count):
            if self._enough(before):
                break
            before.append(self.reached(part))
            if not before[-1].finished and not self._enough(before):
                result.append(part)
        return result

    def _enough(self, parts: Sequence[SplitJournal]) -> bool:
        """Whether what is encoded of the first parts surely holds `max_tokens` to train on, if the
        validation text has none of these documents.
        """
        if self.origin.val_fraction:  # which takes documents of every part
            return False
        tokens = begun = 0
        for entry in (entry for part in parts for entry in part.shards):
            if begun > self.origin.val_docs:  # the first training document began before this shard
                tokens += entry.tokens
            begun += entry.documents
        return 0 < self.origin.max_tokens <= tokens

    def encode(self, part: int, whole: bool = False) -> None:
        """Encodes what is missing of part `part`, or of what `max_tokens` needs if it need not be
        `whole`. Whole shards outlast an error or a kill.
        """
        folder = self.folder(part)
        with held(folder):
            journal = begin_or_resume(folder, self.origin)
            before = self._reread([SplitJournal()] * part if self.origin.max_tokens else [])
            if journal.train.finished or (not whole and self._enough(before)):
                return
            check_sha256(self.tokenizer, self.tokenizer_entry.sha256, CHANGED)

            def on_shard(reached: SplitJournal) -> None:
                save(replace(journal, train=reached), folder)

            table = load_tokenizer(self.tokenizer).token_bytes()
            writer = SplitWriter(folder, "train", _SHARD_TOKENS, table, journal.train, on_shard)
            name = f"{self.source}, part {part + 1} of {self.count}"
            reading = Reading(self.origin.text_key, self.origin.split_on)
            texts = enumerate(documents(self.source, part, self.count, reading))
            left = islice(texts, writer.documents, None)
            with encoder(self.tokenizer, workers=1) as encode:
                for chunk in encode(name, cut_chunks(left)):
                    shards = len(writer.reached.shards)
                    for document in chunk:
                        writer.append(document)
                    if len(writer.reached.shards) > shards:
                        before = self._reread(before)  # other processes may be encoding them
                    if not whole and self._enough([*before, writer.reached]):
                        return writer.finish(ended=False)
            writer.finish()

    def _reread(self, known: Sequence[SplitJournal]) -> list[SplitJournal]:
        """How far parts 0, 1, … are encoded now; whole ones are not read again."""
        return [state if state.finished else self.reached(part) for part, state in enumerate(known)]

    def read(self, first: int) -> Iterator[Encoded]:
        """Yields the source's documents from number `first` (of 0, 1, …) on, in chunks. A part that
        is not whole is encoded to its end only after its last document was taken. Raises
        `DataError` for a part that is damaged.
        """
        for part in range(self.count):
            taken = first
            while True:
                reached = self.reached(part)
                if not reached.offset and reached.documents > taken:
                    yield from self._read_part(self.folder(part), reached, taken)
                    taken = reached.documents
                if reached.finished:
                    break
                self.encode(part, whole=True)
            first = max(0, first - reached.documents)

    def _read_part(self, folder: Path, reached: SplitJournal, first: int) -> Iterator[Encoded]:
        remedy = f"delete {folder} and run the same command again"
        for file in (file for shard in reached.shards for file in shard.files):
            check_sha256(inside(folder, file.name, DataError), file.sha256, remedy)
        kind, end = self.tokenizer_entry, 0
        begins: list[int] = []
        stream = TokenStream(tuple(open_entries(folder, reached.shards)), kind.vocab_size)
        for shard in stream.shards:  # only a document's first token is BOS: no text encodes to it
            begins += (end + np.flatnonzero(shard.tokens == kind.bos_id)).tolist()
            end += len(shard.tokens)
        if len(begins) != reached.documents:
            counts = f"expected {reached.documents} documents, found {len(begins)}"
            raise DataError(f"{folder}: {counts}; {remedy}")
        spans = pairwise([*begins[first:], end])
        table = load_tokenizer(self.tokenizer).token_bytes()
        while chunk := list(islice(spans, _CHUNK_DOCUMENTS)):
            yield [
                counted(
                    table, stream.take(a, b - a), moved(stream.extra(a, b), -a), reached.example
                )
                for a, b in chunk
            ]
