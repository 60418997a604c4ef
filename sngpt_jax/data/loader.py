"""Global batches in the published challenge's order, prefetched and placed in the background.

The tokens of step s depend only on the stream, `batch_tokens`, `seq_len` and `slices`, never on the
number of devices or processes.
"""

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias

import grain
import numpy as np
from grain.sources import RandomAccessDataSource

from sngpt_jax.config import Config
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.permutation import permuted
from sngpt_jax.data.shards import TokenStream

Loader: TypeAlias = grain.DatasetIterator

_THREADS = 2  # reading takes about 1 ms; the second hides a slow page of a network file system
_READY = 2  # placed batches that are kept ready


@dataclass(frozen=True)
class GlobalBatches:
    """All batches of a stream, a grain data source. Item s is {"inputs", "targets"} uint16 [B, T].

    With n = batch_tokens / slices, slice i of step s is the n + 1 tokens of the endless stream at
    (s · slices + i) · (n + 1): its first n tokens are inputs and its last n targets. With 8 slices
    this is the order of the challenge's loader on 1, 2, 4 or 8 devices.

    With a `shuffle_seed`, an epoch takes each whole slice of the stream once, in an order drawn
    from seed and epoch. Raises `DataError` if the stream holds none.
    """

    stream: TokenStream
    batch_tokens: int  # of one step: B · T
    seq_len: int  # T
    slices: int  # divides batch_tokens into whole sequences, as the configuration checks
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        if self.shuffle_seed is not None and not self._epoch_slices:
            raise DataError(
                f"the training stream has {len(self.stream)} tokens, less than one slice of"
                f" data.batch_tokens / data.slices + 1 = {self._span}: prepare more text, or raise"
                " data.slices"
            )

    def __len__(self) -> int:
        return sys.maxsize  # the stream has no end

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        span, first = self._span, operator.index(step) * self.slices
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
        """The place in the stream, in slices, of the run's slice `index`."""
        epoch, index = divmod(index, self._epoch_slices)
        (seed,) = np.random.SeedSequence([self.shuffle_seed or 0, epoch]).generate_state(1)
        return permuted(index, self._epoch_slices, int(seed))

    @property
    def _span(self) -> int:
        return self.batch_tokens // self.slices + 1

    @property
    def _epoch_slices(self) -> int:
        return len(self.stream) // self._span


def batches_of(config: Config, stream: TokenStream) -> GlobalBatches:
    """The recipe's batches of `stream`."""
    d, seed = config.data, config.train.seed if config.data.shuffle else None
    return GlobalBatches(stream, d.batch_tokens, d.seq_len, d.slices, seed)


def make_loader(
    batches: RandomAccessDataSource[dict[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], Any],
    *,
    num_steps: int,
    state: dict[str, int] | None = None,
) -> Loader:
    """An iterator over the batches of steps 0, …, num_steps - 1, after the position `state` if
    given, which `get_state` returns. `close` stops its threads.

    `place` turns a host batch into what the training step takes. It runs in background threads, so
    that the transfer of the next batch overlaps the computation.
    """
    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READY)
    iterator = iter(grain.MapDataset.source(batches)[:num_steps].map(place).to_iter_dataset(read))
    if state is not None:
        iterator.set_state(state)
    iterator.start_prefetch()
    return iterator
