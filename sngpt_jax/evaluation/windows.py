"""How a stream of tokens is cut into windows of T inputs for scoring.

Target i of the stream is its token i + 1. *Sliding* windows advance by `stride` targets. The first
window scores all of its T targets, each later one its last `stride` targets. *Standard* windows
have a stride of T and drop a last partial window.

The devices take rows of T inputs and `stride` scored positions. The first window becomes as many
rows as its targets need.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from sngpt_jax.base.errors import UserError

if TYPE_CHECKING:  # loads libraries that the options of a command do not need
    from sngpt_jax.data.shards import TokenStream

Tail = Literal["full", "published"]
OnProgress = Callable[[int, int], None]  # is called with (done, total)
Item = TypeVar("Item")


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Each item, once the next one has been made: the host reads one while the devices compute
    the next.
    """
    return (item for item, _ in pairwise(chain(items, [None])) if item is not None)


@dataclass(frozen=True)
class Windows:
    """Windows over the first `targets` targets of a stream."""

    targets: int  # M ≥ T
    seq_len: int  # T, inputs of a window
    stride: int  # S ≤ T, targets by which windows advance, and scored positions of a row
    tail: Tail = "full"  # the last window ends with the stream; "published": see `sliding_windows`

    @property
    def whole(self) -> int:
        """Number of windows that begin at a multiple of the stride and end in the stream."""
        return (self.targets - self.seq_len) // self.stride + 1

    @property
    def count(self) -> int:
        if self.tail == "published":
            return math.ceil(self.targets / self.stride)
        return self.whole + ((self.targets - self.seq_len) % self.stride > 0)

    @property
    def num_rows(self) -> int:
        """Number of rows for the devices."""
        return self.count - 1 + math.ceil(self.seq_len / self.stride)

    def rows(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For rows first … stop-1, int64 [rows] each: the stream's index of the first input, and
        the first and the end of the scored positions.
        """
        T, S, M = self.seq_len, self.stride, self.targets
        row = np.arange(first, stop, dtype=np.int64)
        window = np.maximum(row - math.ceil(T / S) + 1, 0)
        start = window * S
        if self.tail == "full":
            start = np.minimum(start, M - T)
        upto = np.minimum(window * S + T, M) - start
        begin = np.maximum(upto - S, 0)
        if self.tail == "full":  # after what the window before has scored
            begin = (window - 1) * S + T - start
        in_first, piece = window == 0, row * S
        upto = np.where(in_first, np.minimum(piece + S, T), upto)
        return start, np.where(in_first, piece, begin), upto

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of scored targets (start, stop); they overlap in a published tail."""
        if self.tail == "full":
            return [(0, self.targets)]
        start, begin, upto = self.rows(self.num_rows - (self.count - self.whole), self.num_rows)
        overrunning = zip((start + begin).tolist(), (start + upto).tolist(), strict=True)
        return [(0, self.seq_len + (self.whole - 1) * self.stride), *overrunning]


def sliding_windows(
    num_tokens: int, seq_len: int, stride: int, max_tokens: int, tail: Tail = "full"
) -> Windows:
    """Windows that advance by `stride` and score each target of a stream of `num_tokens` once, at
    most `max_tokens` targets (0: all). Raises `UserError` if no window fits.

    With the published tail the targets end where standard windows end. Windows that overrun this
    end score the last `stride` targets again with less context, as parameter-golf submissions 465
    and 1573 do.
    """
    if not 1 <= stride <= seq_len:
        raise UserError(
            f"--stride {stride} is not between 1 and one window, data.seq_len = {seq_len}"
        )
    if max_tokens and max_tokens < seq_len:
        raise UserError(
            f"{max_tokens} tokens to score are less than one window of data.seq_len = {seq_len}"
            " tokens; score more tokens"
        )
    if num_tokens <= seq_len:
        raise UserError(
            f"the validation stream has {num_tokens} tokens; one window needs data.seq_len + 1 ="
            f" {seq_len + 1}: hold out more text (prepare --val-fraction)"
        )
    targets = min(num_tokens - 1, max_tokens or num_tokens)
    if tail == "published":
        targets = targets // seq_len * seq_len
    return Windows(targets, seq_len, stride, tail)


def standard_windows(num_tokens: int, seq_len: int, max_tokens: int) -> Windows:
    """Windows side by side; see `sliding_windows`."""
    windows = sliding_windows(num_tokens, seq_len, seq_len, max_tokens)
    return replace(windows, targets=windows.whole * seq_len)


@dataclass(frozen=True)
class DocumentWindows:
    """Windows over documents that lie one after the other in a stream. No target of one sees
    another. A row may run on into the next document, behind its scored positions.
    """

    starts: np.ndarray  # int64 [D], index of each document's first token in the stream, rising
    targets: np.ndarray  # int64 [D], of each document
    seq_len: int  # T
    stride: int  # S
    count: int  # of windows
    parts: np.ndarray  # int64 [3, rows]: what `rows` gives

    @property
    def num_rows(self) -> int:
        """Number of rows for the devices."""
        return self.parts.shape[1]

    def rows(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Windows.rows`."""
        start, begin, upto = self.parts[:, first:stop]
        return start, begin, upto

    def spans(self) -> list[tuple[int, int]]:
        """Ranges of scored targets (start, stop) of the stream."""
        ends = (self.starts + self.targets).tolist()
        return [(a, b) for a, b in zip(self.starts.tolist(), ends, strict=True) if a < b]


def document_windows(
    starts: np.ndarray, targets: np.ndarray, seq_len: int, stride: int
) -> DocumentWindows:
    """Windows that score each target of each document once. A document of at most `seq_len` targets
    is one window. In a longer one they advance by `stride`, and the last one ends with it.
    """
    count, parts = 0, [np.zeros((3, 0), np.int64)]
    for start, number in zip(starts.tolist(), targets.tolist(), strict=True):
        if number > seq_len:
            own = Windows(number, seq_len, stride)
            count += own.count
            first, begin, upto = own.rows(0, own.num_rows)
        else:
            count += number > 0
            begin = np.arange(0, number, stride, dtype=np.int64)
            first, upto = np.zeros_like(begin), np.minimum(begin + stride, number)
        parts.append(np.stack([first + start, begin, upto]))
    return DocumentWindows(starts, targets, seq_len, stride, count, np.concatenate(parts, axis=1))


AnyWindows = Windows | DocumentWindows


def rows_at_a_time(windows: AnyWindows, device_batch_tokens: int, num_devices: int) -> int:
    """Rows of a batch over all devices: as many as fit, at most as many as there are."""
    most = max(1, device_batch_tokens // windows.seq_len)
    return min(most, math.ceil(windows.num_rows / num_devices)) * num_devices


@dataclass(frozen=True)
class WindowBatch:
    """Rows of windows as the devices take them."""

    # "inputs" [B, T], "targets" [B, S]; where S < T "offsets" int32 [B] of the scored positions
    arrays: dict[str, np.ndarray]
    count: int  # rows without the padding
    counted: np.ndarray  # bool [B]: rows that are no padding
    # rows [n] and positions [n] in [B, S] of the targets that count, in order
    scored: tuple[np.ndarray, np.ndarray]


def window_batches(stream: "TokenStream", windows: AnyWindows, rows: int) -> Iterator[WindowBatch]:
    """Batches of `rows`. The last one is padded with its first row."""
    T, S = windows.seq_len, windows.stride
    view = np.lib.stride_tricks.sliding_window_view
    for first in range(0, windows.num_rows, rows):
        start, begin, upto = windows.rows(first, min(first + rows, windows.num_rows))
        offset = np.maximum(upto - S, 0)
        tokens = stream.take(int(start[0]), int(start[-1] - start[0]) + T + 1)
        counted = np.arange(rows) < len(start)
        filled = np.where(counted, np.arange(rows), 0)
        at, shift = (start - start[0])[filled], offset[filled]
        arrays = {"inputs": view(tokens, T)[at], "targets": view(tokens, S)[at + shift + 1]}
        if S < T:
            arrays["offsets"] = shift.astype(np.int32)
        within = np.arange(S)[None] + offset[:, None]
        row, position = np.nonzero((begin[:, None] <= within) & (within < upto[:, None]))
        yield WindowBatch(arrays, len(start), counted, (row, position))


def read_windows(
    stream: "TokenStream",
    windows: AnyWindows,
    rows: int,
    dispatch: Callable[[WindowBatch], Item],
    progress: OnProgress | None = None,
) -> Iterator[tuple[Item, WindowBatch]]:
    """`dispatch(batch)` and the batch, for all batches of `rows`, each once the next one has been
    dispatched. `progress` counts rows.
    """
    done = 0
    batches = window_batches(stream, windows, rows)
    for found, batch in one_behind((dispatch(batch), batch) for batch in batches):
        yield found, batch
        done += batch.count
        if progress:
            progress(done, windows.num_rows)
