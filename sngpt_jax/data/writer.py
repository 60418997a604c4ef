"""The folder that a preparation writes and holds, and the shards that it cuts a split into."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import locked, remove_leftovers, visible
from sngpt_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    PROGRESS,
    ExtraEntry,
    Journal,
    Manifest,
    Origin,
    ShardEntry,
    SplitJournal,
    load_journal,
    load_manifest,
    save,
)
from sngpt_jax.data.shards import (
    TOKEN,
    Shard,
    TokenStream,
    moved,
    open_entries,
    write_hashed,
    write_shard,
)
from sngpt_jax.data.tokenizer import MAX_VOCAB, NO_CORRECTIONS, Document, TokenBytes

PARTS = ".parts"  # subfolder while the source is encoded in parts (`sngpt_jax.data.parts`)


def refuse_other(out: Path, old: Origin, new: Origin) -> None:
    """Raises `UserError` that names the differing fields if `out` holds data of another origin."""
    if lines := old.differences(asdict(new)).values():
        other = f"{out}: holds another preparation's data ({'; '.join(lines)})"
        raise UserError(f"{other}; give another --out, or delete it")


def finished(out: Path, origin: Origin) -> Manifest | None:
    """The manifest of a complete folder of this origin; None if the folder is not complete."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = load_manifest(out)
    refuse_other(out, manifest.origin, origin)
    open_entries(out, (*manifest.val, *manifest.train))
    return manifest


def held(out: Path) -> AbstractContextManager[None]:
    """Makes the folder `out` and holds it. Raises `UserError` if another process holds it."""
    busy = "another preparation is writing there; wait for it, or give another --out"
    return locked(out, f"{out}: {busy}")


def begin_or_resume(out: Path, origin: Origin) -> Journal:
    """The journal of the held folder `out`. Raises `UserError` if the folder holds other data."""
    remove_leftovers(out)
    if (out / PROGRESS).is_file():
        journal = load_journal(out)
        if journal.origin == origin:
            return journal
        if journal.train.shards or journal.val.shards or (out / PARTS).is_dir():
            refuse_other(out, journal.origin, origin)
    elif visible(out, "*.bin"):
        raise UserError(f"{out}: holds .bin files of no preparation; give an empty --out")
    journal = Journal(FORMAT, origin)
    save(journal, out)
    return journal


class SplitWriter:
    """Appends documents to one split of a folder, in shards of exactly `shard_tokens` tokens but
    for the last.

    `reached` says where to resume. The split ends after `limit` tokens (None: never). `on_shard` is
    called with the new state after each complete shard is in place. Appending the documents from
    number `reached.documents` on gives the same files as one run over all of them.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        shard_tokens: int,
        token_bytes: TokenBytes,
        reached: SplitJournal,
        on_shard: Callable[[SplitJournal], None],
        limit: int | None = None,
    ) -> None:
        self.reached = reached
        self.documents, self.tokens = reached.documents, reached.tokens  # appended
        self._dropped, self._example = reached.dropped, reached.example
        self._directory, self._split, self._token_bytes = directory, split, token_bytes
        self._on_shard, self._limit, self._offset = on_shard, limit, reached.offset
        written = open_entries(directory, reached.shards)
        self._previous = int(written[-1].tokens[-1]) if written else None
        self._buffer = np.empty(shard_tokens, TOKEN)
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._filled = self._begun = 0  # tokens, documents
        self._extra: list[np.ndarray] = []
        self._capacity = len(self._buffer)
        if self._limit is not None:
            self._capacity = min(self._capacity, self._limit - self.tokens)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._capacity == 0

    def append(self, document: Document) -> None:
        """Appends the next document. A full split takes none."""
        if self.full:
            return
        tokens, extra = document.tokens, document.corrections
        self._example = self._example or document.example
        while self._offset < len(tokens) and not self.full:
            piece = tokens[self._offset : self._offset + self._capacity - self._filled]
            stop = self._offset + len(piece)
            self._buffer[self._filled : self._filled + len(piece)] = piece
            inside = (extra[:, 0] >= self._offset) & (extra[:, 0] < stop)
            self._extra.append(moved(extra[inside], self._filled - self._offset))
            self._begun += self._offset == 0
            self._filled += len(piece)
            self.tokens += len(piece)
            self._offset = stop
            if self._filled == self._capacity:
                at_end = stop == len(tokens)
                self._end_shard(self.documents + at_end, 0 if at_end else stop)
        if self._offset >= len(tokens):
            self.documents, self._offset = self.documents + 1, 0

    def drop(self) -> None:
        """Counts the next document as left out."""
        self._dropped += 1

    def finish(self, ended: bool = True) -> None:
        """Writes the remaining tokens as the last shard. With `ended` the split has no more."""
        if self._filled:
            self._end_shard(self.documents, self._offset)
        reached = (self.reached.shards, self.documents, self._offset, ended, self._dropped)
        self._reach(SplitJournal(*reached, self._example))

    def _reach(self, state: SplitJournal) -> None:
        self.reached = state
        self._on_shard(state)

    def _end_shard(self, documents: int, offset: int) -> None:
        tokens, extra = self._buffer[: self._filled], np.concatenate(self._extra)
        name = f"{self._split}_{len(self.reached.shards):06d}.bin"
        path, sidecar = self._directory / name, None
        if len(extra):
            file, sidecar_name = io.BytesIO(), f"{name}.extra.npy"
            np.save(file, extra, allow_pickle=False)
            digest = write_hashed(self._directory / sidecar_name, file.getvalue())
            sidecar = ExtraEntry(sidecar_name, digest)
        # A split begins with BOS, which stands for 0 bytes after any token.
        previous = tokens[0] if self._previous is None else self._previous
        before = Shard(path, np.array([previous], TOKEN), NO_CORRECTIONS)
        stream = TokenStream((before, Shard(path, tokens, extra)), MAX_VOCAB)
        counts = stream.count_bytes(self._token_bytes, 1, len(stream))
        digest = write_shard(path, tokens)
        entry = ShardEntry(name, len(tokens), self._begun, *counts, digest, sidecar)
        self._previous = int(tokens[-1])
        shards = (*self.reached.shards, entry)
        which = shards, documents, offset, False, self._dropped, self._example
        self._reach(SplitJournal(*which))
        self._begin_shard()
