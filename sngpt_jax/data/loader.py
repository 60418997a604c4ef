"""Global batches in the published challenge's order, prefetched and placed in the background.

The tokens of step s depend only on the stream, `batch_tokens`, `seq_len` and `slices`, never on the
number of devices or processes.
"""

import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, SupportsIndex, TypeVar

import grain
import numpy as np

from sngpt_jax.config import Config
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.shards import TokenStream

T = TypeVar("T")

_THREADS = 2  # reading takes about 1 ms; the second hides a slow page of a network file system
_READY = 2  # placed batches that are kept ready


@dataclass(frozen=True)
class GlobalBatches:
    """All batches of a stream by step, a grain data source. Item s is {"inputs": uint16 [B, T],
    "targets": uint16 [B, T]}.

    With n = batch_tokens / slices, slice i of step s is the n + 1 tokens of the endless stream at
    (s · slices + i) · (n + 1). Its first n tokens are inputs and its last n are targets, cut into
    n / T sequences. A batch is its slices in order. With 8 slices this is the order of the
    challenge's loader on 1, 2, 4 or 8 devices, where one slice is a device's micro-batch.

    With a `shuffle_seed`, an epoch takes each whole slice of the stream once, in an order drawn
    from seed and epoch. Raises `DataError` if the stream holds no whole slice then.
    """

    stream: TokenStream
    batch_tokens: int  # of one step: B · T
    seq_len: int  # T
    slices: int  # must divide batch_tokens into whole sequences
    shuffle_seed: int | None = None  # draws a new order of slices per epoch; None: in order

    def __post_init__(self) -> None:
        if self.batch_tokens % (self.slices * self.seq_len):
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of slices x seq_len ="
                f" {self.slices} x {self.seq_len}"
            )
        if self.shuffle_seed is not None and not self._epoch_slices:
            raise DataError(
                f"the training stream has {len(self.stream)} tokens, less than one slice of"
                f" data.batch_tokens / data.slices + 1 = {self.batch_tokens // self.slices + 1}:"
                " prepare more text, or raise data.slices"
            )

    def __len__(self) -> int:
        return sys.maxsize  # the stream has no end

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        span = self.batch_tokens // self.slices + 1
        first = operator.index(step) * self.slices
        if self.shuffle_seed is None:
            tokens = self.stream.take(first * span, self.slices * span).reshape(self.slices, span)
        else:
            starts = [self._shuffled(first + i) * span for i in range(self.slices)]
            tokens = np.stack([self.stream.take(start, span) for start in starts])
        return {
            "inputs": tokens[:, :-1].reshape(-1, self.seq_len),
            "targets": tokens[:, 1:].reshape(-1, self.seq_len),
        }

    def _shuffled(self, index: int) -> int:
        """The place in the stream, in slices, of the run's slice number `index`."""
        epoch, index = divmod(index, self._epoch_slices)
        (seed,) = np.random.SeedSequence([self.shuffle_seed or 0, epoch]).generate_state(1)
        # grain's permutation needs no table
        return grain.experimental.index_shuffle(
            index, max_index=self._epoch_slices - 1, seed=int(seed), rounds=4
        )

    @property
    def _epoch_slices(self) -> int:
        return len(self.stream) // (self.batch_tokens // self.slices + 1)


def batches_of(config: Config, stream: TokenStream) -> GlobalBatches:
    """The recipe's batches of `stream`."""
    d = config.data
    return GlobalBatches(
        stream, d.batch_tokens, d.seq_len, d.slices, config.train.seed if d.shuffle else None
    )


class Loader(Iterator[T], Generic[T]):
    """Iterates over placed batches while threads read and place the next ones. It must be closed,
    for example by a `with` statement.
    """

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self._iterator.start_prefetch()

    def __next__(self) -> T:
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except BaseException:
            # The failed batch has left the queue: the next call would skip it.
            self.close()
            raise

    def get_state(self) -> dict[str, int]:
        """The position after the last batch that was taken. It can be stored as JSON."""
        return self._iterator.get_state()

    def close(self) -> None:
        """Stops the threads and drops what they read. A second call does nothing."""
        self._iterator.close()

    def __enter__(self) -> "Loader[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Batches(Protocol):
    """Batches on the host by step, {"inputs", "targets"} [B, T], such as `GlobalBatches`."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]: ...


def make_loader(
    batches: Batches,
    place: Callable[[dict[str, np.ndarray]], T],
    *,
    num_steps: int,
    state: dict[str, int] | None = None,
) -> Loader[T]:
    """A loader of the batches of steps 0, …, num_steps - 1, or of those after the position `state`.

    `state` is a result of `Loader.get_state` from any loader over the same batches. `place` turns a
    host batch into what the training step takes, such as arrays on the devices. It runs in the
    background threads, so that the transfer of the next batch overlaps the current computation.
    """
    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READY)
    iterator = iter(grain.MapDataset.source(batches)[:num_steps].map(place).to_iter_dataset(read))
    if state is not None:
        iterator.set_state(state)
    return Loader(iterator)
