"""Windows against a literal list of (window, position) pairs, and the batches that carry them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.tokenizer import ByteCounts
from sngpt_jax.evaluation.windows import (
    Windows,
    rows_at_a_time,
    sliding_windows,
    standard_windows,
    window_batches,
)


class Stream:
    """A stream in memory without an end. A token t stands for t bytes, plus one for the first token
    of the text after a 0.
    """

    def __init__(self, length, vocab_size):
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, length).astype(np.uint16)

    text_known = True

    def __len__(self):
        return len(self.tokens)

    def take(self, start, count):
        return np.resize(np.roll(self.tokens, -start), count)

    def count_bytes(self, token_bytes, start, stop):
        before, tokens = self.tokens[start - 1 : stop - 1], self.tokens[start:stop]
        size = int(token_bytes.count(before, tokens).sum())
        return ByteCounts(size, size, size, 0)


def literal(targets, T, S, tail):
    """(first input, position) of everything that is scored, in order."""
    scored = []
    if tail == "published":
        targets = targets // T * T
        for start in range(0, targets, S):
            length = min(start + T, targets) - start
            first = max(length - S, 0) if start else 0
            scored += [(start, position) for position in range(first, length)]
        return scored
    for target in range(targets):
        step = max(-(-(target - T + 1) // S), 0)  # the first window that reaches it
        start = min(step * S, targets - T)
        scored.append((start, target - start))
    return scored


def rows_of(windows):
    return [
        (start, position)
        for start, begin, upto in zip(*windows.rows(0, windows.num_rows), strict=True)
        for position in range(begin, upto)
    ]


sizes = st.integers(1, 12).flatmap(
    lambda T: st.tuples(st.just(T), st.integers(1, T), st.integers(T, 5 * T))
)


@given(sizes, st.sampled_from(["full", "published"]))
def test_rows_are_the_literal_ones(size, tail):
    T, S, targets = size
    windows = sliding_windows(targets + 1, T, S, 0, tail)
    scored = literal(targets, T, S, tail)
    assert rows_of(windows) == scored
    assert windows.count == len({start for start, _ in scored})
    covered = sorted(target for start, stop in windows.spans() for target in range(start, stop))
    assert covered == sorted(start + position for start, position in scored)
    if tail == "full":  # each target once, with the longest context that the stride leaves
        assert covered == list(range(targets))
        assert all(position >= min(i, T - S) for i, (_, position) in enumerate(scored))


def test_the_challenges_validation_stream():
    """golf: 62,021,846 tokens; 969,088 windows of stride 64 as published, in each of which 31
    overrun the end.
    """
    published = sliding_windows(62_021_846, 2048, 64, 0, "published")
    assert (published.targets, published.count) == (62_021_632, 969_088)
    spans = published.spans()
    assert len(spans) == 32 and all(span == (62_021_632 - 64, 62_021_632) for span in spans[1:])
    assert sliding_windows(62_021_846, 2048, 64, 0).count == (62_021_845 - 2048) // 64 + 2


@pytest.mark.parametrize("tail", ["full", "published"])
@pytest.mark.parametrize(
    ("T", "S", "length"), [(8, 8, 65), (8, 3, 50), (7, 1, 23), (5, 5, 29), (6, 4, 7)]
)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_batches_carry_the_inputs_and_targets_of_their_rows(T, S, length, tail, rows):
    stream = Stream(length, 1000)
    found = []
    for batch in window_batches(stream, sliding_windows(length, T, S, 0, tail), rows):
        inputs, targets = batch.arrays["inputs"], batch.arrays["targets"]
        assert inputs.shape == (rows, T) and targets.shape == (rows, S)
        assert ("offsets" in batch.arrays) == (S < T)
        offsets = batch.arrays.get("offsets", np.zeros(rows, int))
        assert np.all(offsets + S <= T)
        for row, position in zip(*batch.scored, strict=True):
            assert row < batch.count
            at = offsets[row] + position
            found.append([*inputs[row, : at + 1], targets[row, position]])
    expected = [
        stream.tokens[start : start + position + 2].tolist()
        for start, position in literal(length - 1, T, S, tail)
    ]
    assert found == expected


def test_a_limit_takes_the_start():
    assert standard_windows(1000, 8, 87) == standard_windows(81, 8, 0) == Windows(80, 8, 8)
    assert sliding_windows(1000, 8, 4, 87) == Windows(87, 8, 4)
    assert sliding_windows(1000, 8, 4, 87, "published") == Windows(80, 8, 4, "published")
    assert sliding_windows(50, 8, 4, 1000) == Windows(49, 8, 4)


def test_no_more_rows_at_a_time_than_there_are():
    for arguments, rows in (((64, 1), 8), ((64, 4), 12), ((1, 8), 8)):
        assert rows_at_a_time(Windows(80, 8, 8), *arguments) == rows


def test_windows_that_cannot_be():
    assert standard_windows(9, 8, 0).num_rows == 1
    with pytest.raises(UserError, match="8 tokens; one window needs data.seq_len \\+ 1 = 9"):
        standard_windows(8, 8, 0)
    with pytest.raises(UserError, match="7 tokens to score are less than one window"):
        sliding_windows(100, 8, 4, 7)
    for stride in (0, -1, 9):
        with pytest.raises(UserError, match="--stride"):
            sliding_windows(100, 8, stride, 0)
