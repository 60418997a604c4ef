"""Cuts a split's documents into shards, at positions that depend on nothing but the documents."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sngpt_jax.data.manifest import ExtraEntry, ShardEntry, SplitProgress
from sngpt_jax.data.shards import (
    NO_EXTRA,
    TOKEN,
    Shard,
    TokenStream,
    open_entries,
    write_hashed,
    write_shard,
)
from sngpt_jax.data.tokenizer import MAX_VOCAB, TokenBytes


class SplitWriter:
    """Appends documents to one split of a folder; each shard but the last holds exactly
    `shard_tokens` tokens.

    `progress` says where to go on and `limit` after how many tokens of the whole split to stop
    (None: never). After each shard that is complete and in place, `on_shard` is called with the
    new progress. Appending the documents from number `progress.documents` on gives the same files
    as one run over all of them.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        shard_tokens: int,
        *,
        limit: int | None,
        token_bytes: TokenBytes,
        progress: SplitProgress,
        on_shard: Callable[[SplitProgress], None],
    ) -> None:
        self.progress = progress
        self.documents = progress.documents  # appended whole
        # appended, the unfinished shard's included
        self.tokens = sum(entry.tokens for entry in progress.shards)
        self._directory, self._split, self._token_bytes, self._on_shard = (
            directory,
            split,
            token_bytes,
            on_shard,
        )
        self._limit = limit
        self._offset = progress.offset
        written = open_entries(directory, progress.shards)
        self._previous = int(written[-1].tokens[-1]) if written else None
        self._buffer = np.empty(shard_tokens, TOKEN)
        self._begin_shard()

    def _begin_shard(self) -> None:
        self._filled = self._begun = 0
        self._extra: list[np.ndarray] = []
        left = len(self._buffer) if self._limit is None else self._limit - self.tokens
        self._capacity = min(len(self._buffer), left)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self._capacity == 0

    def append(self, tokens: np.ndarray, extra: np.ndarray) -> None:
        """Appends the next document: tokens uint16 [n], BOS first, and byte corrections int64 [m,
        2]. When full, nothing.
        """
        if self.full:
            return
        while self._offset < len(tokens) and not self.full:
            piece = tokens[self._offset : self._offset + self._capacity - self._filled]
            stop = self._offset + len(piece)
            self._buffer[self._filled : self._filled + len(piece)] = piece
            inside = (extra[:, 0] >= self._offset) & (extra[:, 0] < stop)
            self._extra.append(extra[inside] + np.array([self._filled - self._offset, 0]))
            self._begun += self._offset == 0
            self._filled += len(piece)
            self.tokens += len(piece)
            self._offset = stop
            if self._filled == self._capacity:
                at_end = stop == len(tokens)
                self._end_shard(self.documents + at_end, 0 if at_end else stop)
        if self._offset >= len(tokens):
            self.documents, self._offset = self.documents + 1, 0

    def finish(self) -> None:
        """Writes what is left as the last shard."""
        if self._filled:
            self._end_shard(self.documents, self._offset)
        self.progress = SplitProgress(
            self.progress.shards, self.documents, self._offset, finished=True
        )
        self._on_shard(self.progress)

    def _end_shard(self, documents: int, offset: int) -> None:
        tokens = self._buffer[: self._filled]
        extra = np.concatenate(self._extra)
        name = f"{self._split}_{len(self.progress.shards):06d}.bin"
        sidecar = None
        if len(extra):
            file = io.BytesIO()
            np.save(file, extra, allow_pickle=False)
            sidecar_name = f"{name}.extra.npy"
            sidecar = ExtraEntry(
                sidecar_name, write_hashed(self._directory / sidecar_name, file.getvalue())
            )
        entry = ShardEntry(
            name=name,
            tokens=len(tokens),
            documents=self._begun,
            bytes=self._count_bytes(Shard(self._directory / name, tokens, extra)),
            sha256=write_shard(self._directory / name, tokens),
            extra=sidecar,
        )
        self._previous = int(tokens[-1])
        self.progress = SplitProgress((*self.progress.shards, entry), documents, offset)
        self._on_shard(self.progress)
        self._begin_shard()

    def _count_bytes(self, shard: Shard) -> int:
        # a split begins with BOS: 0 bytes
        previous = shard.tokens[0] if self._previous is None else self._previous
        before = Shard(shard.path, np.array([previous], TOKEN), NO_EXTRA)
        return TokenStream((before, shard), MAX_VOCAB).count_bytes(
            self._token_bytes, 1, 1 + len(shard.tokens)
        )
