"""The order of batches against a literal sequential reading, and saved positions."""

import json
import threading
import time
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.data.loader import GlobalBatches, make_loader
from tests.data.conftest import damaged, stream_of, wait_until


class PublishedStream:
    """The challenge's token stream, step by step: a file, a position in it, then the next file."""

    def __init__(self, shards):
        self.shards, self.file, self.position = shards, 0, 0

    def take(self, count):
        pieces = []
        while count > 0:
            available = len(self.shards[self.file]) - self.position
            if available <= 0:
                self.file, self.position = (self.file + 1) % len(self.shards), 0
                continue
            size = min(count, available)
            pieces.append(self.shards[self.file][self.position : self.position + size])
            self.position += size
            count -= size
        return np.concatenate(pieces)


def published_batch(stream, world, batch_tokens, seq_len):
    """One step of the published loader on `world` devices, in 8 / world micro-steps."""
    accumulation = 8 // world
    local = batch_tokens // (world * accumulation)
    inputs, targets = [], []
    for _ in range(accumulation):
        chunk = stream.take((local + 1) * world)
        for rank in range(world):
            mine = chunk[rank * (local + 1) : (rank + 1) * (local + 1)]
            inputs.append(mine[:-1].reshape(-1, seq_len))
            targets.append(mine[1:].reshape(-1, seq_len))
    return np.concatenate(inputs), np.concatenate(targets)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_order_is_the_published_loaders_on_any_number_of_devices(world):
    shards = [np.arange(a, b, dtype=np.uint16) for a, b in ((0, 700), (700, 701), (701, 1500))]
    published = PublishedStream(shards)
    batches = GlobalBatches(stream_of(*shards), batch_tokens=192, seq_len=8, slices=8)
    for step in range(30):  # 30 x 200 tokens: wraps four times
        inputs, targets = published_batch(published, world, 192, 8)
        np.testing.assert_array_equal(batches[step]["inputs"], inputs)
        np.testing.assert_array_equal(batches[step]["targets"], targets)
        assert batches[step]["inputs"].dtype == np.uint16


@given(st.integers(1, 40), *[st.integers(1, n) for n in (4, 4, 6, 10**12)])
def test_a_batch_of_a_stream_shorter_than_itself_wraps(length, slices, rows, seq_len, step):
    tokens = np.arange(length, dtype=np.uint16)
    batch = GlobalBatches(stream_of(tokens), slices * rows * seq_len, seq_len, slices)[step]
    span = rows * seq_len + 1
    starts = (step * slices + np.arange(slices))[:, None] * span
    for name, shift in (("inputs", 0), ("targets", 1)):
        positions = starts + np.arange(span - 1) + shift
        np.testing.assert_array_equal(batch[name], (positions % length).reshape(-1, seq_len))


def starts_of(batches, steps):
    """The positions in the stream where the slices of `steps` begin."""
    rows = batches.batch_tokens // batches.slices // batches.seq_len
    return np.concatenate([batches[step]["inputs"][::rows, 0] for step in steps])


def test_a_shuffled_epoch_takes_every_slice_once_in_an_order_of_its_own():
    stream = stream_of(np.arange(0, 700, dtype=np.uint16), np.arange(700, 2049, dtype=np.uint16))
    # 120 whole slices of 17, 30 steps
    batches = GlobalBatches(stream, batch_tokens=64, seq_len=8, slices=4, shuffle_seed=3)
    epochs = [starts_of(batches, range(30 * i, 30 * i + 30)) for i in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(0, 120 * 17, 17))
    assert np.corrcoef(np.arange(120), epochs[0])[0, 1] < 0.5
    assert np.any(epochs[0] != epochs[1]) and np.any(epochs[1] != epochs[2])
    other = GlobalBatches(stream, batch_tokens=64, seq_len=8, slices=4, shuffle_seed=4)
    assert np.any(starts_of(other, range(30)) != epochs[0])
    inputs, targets = batches[7]["inputs"].astype(int), batches[7]["targets"].astype(int)
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(8))


def test_a_stream_shorter_than_a_slice_cannot_be_shuffled():
    stream = stream_of(np.arange(16, dtype=np.uint16))
    damaged("16 tokens, less than one slice .* = 17", GlobalBatches, stream, 64, 8, 4, 0)


# ---------------------------------------- the background loader


@pytest.fixture
def batches():
    tokens = np.random.default_rng(0).integers(0, 2**16, 10_007).astype(np.uint16)
    return GlobalBatches(stream_of(tokens), batch_tokens=256, seq_len=16, slices=4)


def sums(loader):
    return [int(batch["inputs"].sum(dtype=int)) for batch in loader]


@pytest.mark.parametrize("taken", [0, 2, 11, 12])
def test_saved_position_counts_what_was_taken_and_not_what_was_prefetched(batches, taken):
    placed = []

    def place(batch):
        placed.extend(sums([batch]))
        return batch

    with closing(make_loader(batches, place, num_steps=12)) as loader:
        for _ in range(taken):
            next(loader)
        # the next one is ready in the background
        wait_until(lambda: len(placed) >= min(12, taken + 1))
        state = json.loads(json.dumps(loader.get_state()))
        rest = sums(loader)
    placed.clear()
    with closing(make_loader(batches, place, num_steps=12, state=state)) as fresh:
        assert fresh.get_state() == state
        assert sums(fresh) == rest == sums(batches[step] for step in range(taken, 12))
    assert sorted(placed) == sorted(rest)  # nothing before it is read


def test_the_next_batch_is_placed_before_it_is_asked_for_in_another_thread(batches):
    threads = []

    def place(batch):
        threads.append(threading.current_thread())
        return batch

    with closing(make_loader(batches, place, num_steps=100)) as loader:
        wait_until(lambda: len(threads) == 2)
        next(loader)
        wait_until(lambda: len(threads) == 3)
        time.sleep(0.05)
        assert len(threads) == 3  # and no more than two ahead: they hold device memory
        assert threading.main_thread() not in threads
    wait_until(lambda: not any(thread.is_alive() for thread in threads))
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_error_in_the_background_reaches_the_caller():
    tokens = np.zeros(1000, np.uint16)
    tokens[700] = 50
    batches = GlobalBatches(stream_of(tokens, vocab_size=50), batch_tokens=99, seq_len=99, slices=1)
    message = r"0\.bin: expected tokens below the vocabulary size 50, found 50 at token 700"
    with closing(make_loader(batches, lambda batch: batch, num_steps=20)) as loader:
        for _ in range(7):
            next(loader)
        damaged(message, next, loader)
