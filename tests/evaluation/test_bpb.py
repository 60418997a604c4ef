"""Standard windows against a literal loop; batching, devices and limits change nothing."""

import math

import jax
import numpy as np
import pytest

from sngpt_jax.cli import UserError
from sngpt_jax.data.tokenizer import TokenBytes
from sngpt_jax.evaluation.bpb import score_stream, standard_windows
from sngpt_jax.parallel import make_mesh

V = 11


class Stream:
    """A stream in memory whose token t stands for t bytes, plus one for the first token of the text after a 0."""

    def __init__(self, length):
        self.tokens = np.random.default_rng(0).integers(0, V, length).astype(np.uint16)

    def __len__(self):
        return len(self.tokens)

    def take(self, start, count):
        assert start + count <= len(self.tokens)
        return self.tokens[start : start + count]

    def count_bytes(self, token_bytes, start, stop):
        return int(token_bytes.count(self.tokens[start - 1 : stop - 1], self.tokens[start:stop]).sum())


BYTES = TokenBytes(np.arange(V, dtype=np.int32), np.ones(V, bool), np.arange(V) == 0)


def fake_loss(position, inputs, target):
    """A loss that depends on the target, the window's first token and the place in it."""
    return 0.1 * target + 0.01 * inputs[0] + 0.001 * position


def fake_eval_step(params, batch):
    """Row sums of `fake_loss`, as the real step gives them."""
    inputs, targets = (np.asarray(batch[name], np.float64) for name in ("inputs", "targets"))
    T = inputs.shape[1]
    return np.asarray(0.1 * targets.sum(1) + 0.01 * T * inputs[:, 0] + 0.001 * T * (T - 1) / 2, np.float32)


def score(stream, seq_len, devices=1, device_batch_tokens=64, **kwargs):
    mesh = make_mesh(jax.devices()[:devices])
    return score_stream(
        None, fake_eval_step, stream, BYTES, mesh, seq_len=seq_len, device_batch_tokens=device_batch_tokens, **kwargs
    )


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18, 100, 257])
@pytest.mark.parametrize("seq_len", [1, 8])
def test_equals_a_literal_loop(length, seq_len):
    stream = Stream(length)
    nll = total = count = 0
    for start in range(0, length - seq_len, seq_len):
        window = stream.tokens[start : start + seq_len + 1].astype(int)
        for position in range(seq_len):
            previous, target = window[position], window[position + 1]
            nll += fake_loss(position, window, target)
            total += target + (previous != 0)
            count += 1
    got = score(stream, seq_len)
    assert (got.tokens, got.bytes) == (count, total)
    assert got.loss == pytest.approx(nll / count, rel=1e-6)
    assert got.bpb == pytest.approx(nll / math.log(2) / total, rel=1e-6)


@pytest.mark.parametrize(("devices", "device_batch_tokens"), [(1, 8), (1, 24), (8, 8), (8, 16), (3, 10_000)])
def test_batching_changes_nothing(devices, device_batch_tokens):
    stream = Stream(1001)
    assert score(stream, 8, devices, device_batch_tokens) == score(stream, 8)


def test_a_limit_scores_the_start():
    stream, start = Stream(1000), Stream(1000)
    start.tokens = stream.tokens[:81]
    assert score(stream, 8, max_tokens=80) == score(stream, 8, max_tokens=87) == score(start, 8)


def test_progress_counts_windows():
    seen = []
    score(Stream(100), 8, device_batch_tokens=40, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_a_stream_shorter_than_a_window_is_an_error():
    assert standard_windows(9, 8, 0) == 1
    with pytest.raises(UserError, match="8 tokens"):
        standard_windows(8, 8, 0)
