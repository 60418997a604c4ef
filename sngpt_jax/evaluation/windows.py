"""How a stream of tokens is cut into windows of T inputs for scoring.

Target i of the stream is its token i + 1, predicted from tokens ≤ i. *Standard* windows lie side
by side: each target sees the inputs of its own window alone, and a last partial window is dropped.
*Sliding* windows advance by `stride` targets: the first one scores all of its T targets, each
later one its last `stride`, so that these see T - stride + 1 to T inputs. Standard windows are
sliding ones whose stride is T.

The devices take rows of one shape, T inputs and `stride` scored positions; the first window is as
many rows as its targets need.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.shards import TokenStream

Tail = Literal["full", "published"]


@dataclass(frozen=True)
class Windows:
    """Windows over the first `targets` targets of a stream, no fewer than `seq_len`; stride from 1
    to `seq_len`.
    """

    targets: int  # M
    seq_len: int  # T, inputs of a window
    stride: int  # S, targets by which windows advance, and scored positions of a row
    # what is left at the end: one window of T inputs; or published, see `sliding_windows`
    tail: Tail = "full"

    @property
    def whole(self) -> int:
        """Windows that begin at a multiple of the stride and end within the targets."""
        return (self.targets - self.seq_len) // self.stride + 1

    @property
    def count(self) -> int:
        """Windows in all."""
        if self.tail == "published":
            return math.ceil(self.targets / self.stride)
        return self.whole + ((self.targets - self.seq_len) % self.stride > 0)

    @property
    def num_rows(self) -> int:
        """Rows that the devices take for them: one a window, but as many as its targets need for
        the first.
        """
        return self.count - 1 + math.ceil(self.seq_len / self.stride)

    def rows(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows first … stop-1: the first input of each, and from and up to which of its positions
        it scores; int64 [rows].
        """
        T, S, M = self.seq_len, self.stride, self.targets
        pieces = math.ceil(T / S)  # of the first window
        row = np.arange(first, stop, dtype=np.int64)
        start = np.maximum(row - pieces + 1, 0) * S
        if self.tail == "full":
            start = np.minimum(start, M - T)
            scored = np.minimum((row - pieces + 1) * S + T, M)  # targets of all rows up to this one
            upto = np.where(row < pieces, np.minimum((row + 1) * S, T), scored - start)
            begin = np.where(row < pieces, row * S, (row - pieces) * S + T - start)
        else:
            upto = np.where(row < pieces, np.minimum((row + 1) * S, T), np.minimum(T, M - start))
            begin = np.where(row < pieces, row * S, np.maximum(upto - S, 0))
        return start, begin, upto

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of targets, from and up to, that together are what the rows score; only a
        published tail scores some again.
        """
        if self.tail == "full":
            return [(0, self.targets)]
        start, begin, upto = self.rows(self.num_rows - (self.count - self.whole), self.num_rows)
        overrunning = zip((start + begin).tolist(), (start + upto).tolist(), strict=True)
        return [(0, self.seq_len + (self.whole - 1) * self.stride), *overrunning]


def _limited(num_tokens: int, seq_len: int, max_tokens: int) -> int:
    """Targets of a stream of `num_tokens`, at most `max_tokens` (0: no limit); raises `UserError`
    below one window.
    """
    if max_tokens and max_tokens < seq_len:
        raise UserError(
            f"{max_tokens} tokens to score are less than one window of data.seq_len = {seq_len}"
            " tokens"
        )
    if num_tokens - 1 < seq_len:
        raise UserError(
            f"the validation stream has {num_tokens} tokens; one window needs data.seq_len + 1 ="
            f" {seq_len + 1}: hold out more documents (prepare --val-docs) or score shorter"
            " sequences"
        )
    return min(num_tokens - 1, max_tokens or num_tokens)


def standard_windows(num_tokens: int, seq_len: int, max_tokens: int) -> Windows:
    """As many windows side by side as a stream of `num_tokens` holds, of at most `max_tokens`
    targets in all (0: no limit).
    """
    return Windows(_limited(num_tokens, seq_len, max_tokens) // seq_len * seq_len, seq_len, seq_len)


def sliding_windows(
    num_tokens: int, seq_len: int, stride: int, max_tokens: int, tail: Tail = "full"
) -> Windows:
    """Windows that advance by `stride` over all targets, or the first `max_tokens`; each is scored
    once.

    With the published tail the targets end where standard windows end, and windows that overrun
    this end are kept, each scoring the last `stride` targets once more with less context, as
    parameter-golf submissions 333, 465 and 1573 do. Raises `UserError` for a stride that is not
    between 1 and `seq_len`.
    """
    if not 1 <= stride <= seq_len:
        raise UserError(
            f"--stride {stride} is not between 1 and one window, data.seq_len = {seq_len}"
        )
    targets = _limited(num_tokens, seq_len, max_tokens)
    return Windows(
        targets // seq_len * seq_len if tail == "published" else targets, seq_len, stride, tail
    )


def rows_at_a_time(windows: Windows, device_batch_tokens: int, num_devices: int) -> int:
    """How many rows all devices read at a time: as many as fit, no more than there are, a multiple
    of the devices.
    """
    return (
        min(
            max(1, device_batch_tokens // windows.seq_len),
            math.ceil(windows.num_rows / num_devices),
        )
        * num_devices
    )


@dataclass(frozen=True)
class WindowBatch:
    """Rows of windows as the devices take them."""

    # "inputs" [B, T], "targets" [B, S]; where S < T "offsets" int32 [B] of the scored positions
    arrays: dict[str, np.ndarray]
    count: int  # rows that are more than filling
    # rows [n] and positions [n] in [B, S] of the targets that count, in order
    scored: tuple[np.ndarray, np.ndarray]


def window_batches(stream: TokenStream, windows: Windows, rows: int) -> Iterator[WindowBatch]:
    """All rows of `windows` in batches of `rows`; the last one is filled up with its first row."""
    T, S = windows.seq_len, windows.stride
    positions = np.arange(S)
    for first in range(0, windows.num_rows, rows):
        start, begin, upto = windows.rows(first, min(first + rows, windows.num_rows))
        offset = np.maximum(upto - S, 0)
        tokens = stream.take(int(start[0]), int(start[-1] - start[0]) + T + 1)
        filled = np.concatenate([np.arange(len(start)), np.zeros(rows - len(start), np.int64)])
        at, shift = (start - start[0])[filled], offset[filled]
        arrays = {
            "inputs": np.lib.stride_tricks.sliding_window_view(tokens, T)[at],
            "targets": np.lib.stride_tricks.sliding_window_view(tokens, S)[at + shift + 1],
        }
        if S < T:
            arrays["offsets"] = shift.astype(np.int32)
        within = positions[None] + offset[:, None]
        row, position = np.nonzero((begin[:, None] <= within) & (within < upto[:, None]))
        yield WindowBatch(arrays, len(start), (row, position))
