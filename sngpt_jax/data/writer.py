"""Cuts a split's documents into shards. The cuts depend only on the documents."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sngpt_jax.data.manifest import ExtraEntry, ShardEntry, SplitJournal
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
    """Appends documents to one split of a folder. Each shard but the last has exactly
    `shard_tokens` tokens.

    `reached` says where to resume. The split ends after `limit` tokens (None: never). After each
    complete shard is in place, `on_shard` is called with the new state. Appending the documents
    from number `reached.documents` on gives the same files as one run over all of them.
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
        self.documents = reached.documents  # appended whole
        self.tokens = reached.tokens  # appended
        self._directory, self._split, self._token_bytes = directory, split, token_bytes
        self._on_shard, self._limit, self._offset = on_shard, limit, reached.offset
        written = open_entries(directory, reached.shards)
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
        2]. A full split takes none.
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
        """Writes the remaining tokens as the last shard."""
        if self._filled:
            self._end_shard(self.documents, self._offset)
        self._reach(SplitJournal(self.reached.shards, self.documents, self._offset, finished=True))

    def _reach(self, state: SplitJournal) -> None:
        self.reached = state
        self._on_shard(state)

    def _end_shard(self, documents: int, offset: int) -> None:
        tokens = self._buffer[: self._filled]
        extra = np.concatenate(self._extra)
        name = f"{self._split}_{len(self.reached.shards):06d}.bin"
        path = self._directory / name
        sidecar = None
        if len(extra):
            file, sidecar_name = io.BytesIO(), f"{name}.extra.npy"
            np.save(file, extra, allow_pickle=False)
            digest = write_hashed(self._directory / sidecar_name, file.getvalue())
            sidecar = ExtraEntry(sidecar_name, digest)
        count = self._count_bytes(Shard(path, tokens, extra))
        entry = ShardEntry(
            name, len(tokens), self._begun, count, write_shard(path, tokens), sidecar
        )
        self._previous = int(tokens[-1])
        self._reach(SplitJournal((*self.reached.shards, entry), documents, offset))
        self._begin_shard()

    def _count_bytes(self, shard: Shard) -> int:
        # A split begins with BOS, which stands for 0 bytes after any token.
        previous = shard.tokens[0] if self._previous is None else self._previous
        before = Shard(shard.path, np.array([previous], TOKEN), NO_EXTRA)
        return TokenStream((before, shard), MAX_VOCAB).count_bytes(
            self._token_bytes, 1, 1 + len(shard.tokens)
        )
