"""Global batches in the published challenge's order, prefetched and placed in the background, with
an exact position.

Which tokens step s trains on depends on the stream, `batch_tokens`, `seq_len` and `slices` alone:
never on the number of devices or processes.
"""

import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, SupportsIndex, TypeVar

import grain
import numpy as np

from sngpt_jax.config import Config
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.shards import TokenStream

T = TypeVar("T")

# reading a batch takes about a millisecond; the second hides a slow page of a network file system
_THREADS = 2
_READY = 2  # batches kept ready, already placed: the next one, and the one after it


@dataclass(frozen=True)
class GlobalBatches:
    """All batches of a stream by step: a grain data source. Item s is {"inputs": uint16 [B, T],
    "targets": uint16 [B, T]}.

    With n = batch_tokens / slices, slice i of step s is the n + 1 tokens of the endless stream at
    (s · slices + i) · (n + 1); its first n are inputs and its last n targets, cut into n / T
    sequences. A batch is its slices in order. With 8 slices this is the order of the challenge's
    loader on 1, 2, 4 or 8 devices, where a device's micro-batch is one slice.

    With a `shuffle_seed` an epoch is the whole slices that the stream holds, each once, in an
    order drawn from seed and epoch.
    """

    stream: TokenStream
    batch_tokens: int  # of one step: B · T
    seq_len: int  # T
    slices: int  # must divide batch_tokens into whole sequences
    # take an epoch's slices in a random order of their own; None: one after the other
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        if min(self.batch_tokens, self.seq_len, self.slices) < 1 or self.batch_tokens % (
            self.slices * self.seq_len
        ):
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
            tokens = np.stack(
                [
                    self.stream.take(self._shuffled(first + i) * span, span)
                    for i in range(self.slices)
                ]
            )
        return {
            "inputs": tokens[:, :-1].reshape(-1, self.seq_len),
            "targets": tokens[:, 1:].reshape(-1, self.seq_len),
        }

    def _shuffled(self, index: int) -> int:
        """The place in the stream, in slices, of the run's slice number `index`; grain's
        permutation needs no table.
        """
        epoch, index = divmod(index, self._epoch_slices)
        (seed,) = np.random.SeedSequence([self.shuffle_seed or 0, epoch]).generate_state(1)
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
    """Iterates over placed batches while threads read and place the next ones. Close it, or use it
    in a `with` statement.
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
            # the failed batch has left the queue: going on would give the one after it in its place
            self.close()
            raise

    def get_state(self) -> dict[str, int]:
        """The position after the last batch that was taken, whatever has been prefetched; it
        survives JSON.
        """
        return self._iterator.get_state()

    def close(self) -> None:
        """Stops the threads; what they are reading is dropped. A second call does nothing."""
        self._iterator.close()

    def __enter__(self) -> "Loader[T]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Batches(Protocol):
    """Batches on the host by step, {"inputs", "targets"} [B, T]: `GlobalBatches`, or others in
    their place.
    """

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

    `state` is what `Loader.get_state` gave, of any loader over the same batches. `place` turns a
    host batch into what the training step takes, such as arrays on the devices; it runs in the
    background threads, so that the transfer of the next batch overlaps the computation on this
    one.
    """
    read = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READY)
    iterator = iter(grain.MapDataset.source(batches)[:num_steps].map(place).to_iter_dataset(read))
    if state is not None:
        iterator.set_state(state)
    return Loader(iterator)
