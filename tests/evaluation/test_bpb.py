"""Scores against a literal loop; batching, devices and limits change nothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import ModelConfig
from sngpt_jax.data.tokenizer import TokenBytes
from sngpt_jax.evaluation.bpb import Pass, Sum
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import sliding_windows, standard_windows
from sngpt_jax.model.forward import forward, init_variables
from tests.evaluation.test_windows import literal

V = 11


class Stream:
    """A stream in memory whose token t stands for t bytes, plus one for the first token of the
    text after a 0.
    """

    def __init__(self, length, vocab_size=V):
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, length).astype(np.uint16)

    def __len__(self):
        return len(self.tokens)

    def take(self, start, count):
        return np.resize(np.roll(self.tokens, -start), count)

    def count_bytes(self, token_bytes, start, stop):
        return int(
            token_bytes.count(self.tokens[start - 1 : stop - 1], self.tokens[start:stop]).sum()
        )


BYTES = TokenBytes(np.arange(V, dtype=np.int32), np.ones(V, bool), np.arange(V) == 0)


def fake_loss(position, inputs, target):
    """A loss that depends on the target, the window's first token and the place in it."""
    return np.float32(0.1 * target + 0.01 * inputs[0] + 0.001 * position)


def fake_eval_step(variables, batch):
    inputs, targets = (np.asarray(batch[name], np.float64) for name in ("inputs", "targets"))
    offsets = np.asarray(batch.get("offsets", np.zeros(len(inputs))))
    position = offsets[:, None] + np.arange(targets.shape[1])
    return {"nll": (0.1 * targets + 0.01 * inputs[:, :1] + 0.001 * position).astype(np.float32)}


def score(stream, windows, devices=1, device_batch_tokens=64, progress=None):
    mesh = make_mesh(jax.devices()[:devices])
    options = mesh, windows, device_batch_tokens, progress
    return Pass(None, fake_eval_step, stream, BYTES, *options).score()


def literal_score(tokens, pairs):
    """Loss, bits per byte, tokens and bytes of (first input, position) pairs, in exact arithmetic
    but for the losses.
    """
    nll = [
        float(fake_loss(position, tokens[start:], tokens[start + position + 1]))
        for start, position in pairs
    ]
    total = sum(int(tokens[s + p + 1]) + int(tokens[s + p] != 0) for s, p in pairs)
    return math.fsum(nll) / len(nll), math.fsum(nll) / math.log(2) / total, len(nll), total


@pytest.mark.parametrize(
    ("length", "seq_len", "stride", "tail"),
    [
        *((length, T, S, "full") for length, T, S in [(9, 8, 8), (100, 1, 1), (257, 8, 8)]),
        *((102, 8, stride, "full") for stride in (1, 3, 5)),
        (45, 8, 2, "published"),
    ],
)
def test_scores_equal_a_literal_loop(length, seq_len, stride, tail):
    stream = Stream(length)
    windows = sliding_windows(length, seq_len, stride, 0, tail)
    got = score(stream, windows)
    expected = literal_score(stream.tokens, literal(length - 1, seq_len, stride, tail))
    assert (got.loss, got.bpb, got.tokens, got.bytes) == pytest.approx(expected, rel=1e-12)


def test_a_partial_standard_window_is_dropped():
    assert score(Stream(24), standard_windows(24, 8, 0)).tokens == 16


@pytest.mark.parametrize(
    ("devices", "device_batch_tokens"), [(1, 8), (1, 24), (8, 8), (8, 16), (3, 10_000)]
)
@pytest.mark.parametrize("stride", [3, 8])
def test_batching_changes_nothing(devices, device_batch_tokens, stride):
    stream, windows = Stream(1001), sliding_windows(1001, 8, stride, 0)
    assert score(stream, windows, devices, device_batch_tokens) == score(stream, windows)


def test_a_sum_does_not_depend_on_how_it_is_cut():
    values = np.random.default_rng(0).lognormal(sigma=9, size=1000)
    totals = set()
    for pieces in (1, 7, 1000):
        sum = Sum()
        for piece in np.array_split(values, pieces):
            sum.add(piece)
        totals.add(sum.total)
    assert len(totals) == 1 and totals.pop() == pytest.approx(math.fsum(values), rel=1e-13)


def test_float32_losses_are_summed_in_float64():
    """2^24 ones and one more, which float32 would lose."""
    sum = Sum()
    sum.add(np.ones(2**24, np.float32))
    sum.add(np.ones(1, np.float32))
    assert sum.total == 2**24 + 1


def test_progress_counts_rows():
    seen = []
    score(
        Stream(100),
        standard_windows(100, 8, 0),
        device_batch_tokens=40,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_hints_are_asked_for_in_the_order_of_the_targets():
    asked, sent = [], []

    def hints(targets):
        asked.extend(targets.tolist())
        return np.where(targets % 2, targets.astype(np.int32), -1)

    def step(variables, batch):
        sent.append(np.asarray(batch["hints"]))
        return {"nll": np.asarray(batch["hints"]).astype(np.float32)}

    stream, mesh = Stream(60), make_mesh(jax.devices()[:2])
    windows = sliding_windows(60, 8, 3, 0)
    found = list(Pass(None, step, stream, BYTES, mesh, windows, 24).readings(hints))
    assert asked == stream.tokens[1:].tolist()
    assert sent[0].shape == (6, 3)
    given = np.concatenate([piece["hints"] for piece in found])
    targets = np.concatenate([piece["targets"] for piece in found])
    read = np.concatenate([piece["nll"] for piece in found])
    np.testing.assert_array_equal(targets, stream.tokens[1:])
    np.testing.assert_array_equal(given, np.where(targets % 2, targets.astype(int), -1))
    # nothing is asked of the model where there is no hint
    np.testing.assert_array_equal(read, np.maximum(given, 0))


# --------------------------------------------------------------------------------------- of a model

T = 16
TINY = ModelConfig(
    vocab_size=29,
    num_layers=2,
    d_model=32,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=48,
    max_seq_len=T,
    embed_init_std=0.7,
)


def model_score(config, windows, devices, device_batch_tokens):
    mesh = make_mesh(jax.devices()[:devices])
    params = init_variables(config, jax.random.key(0))[0]
    table = TokenBytes(np.ones(29, np.int32), np.zeros(29, bool), np.zeros(29, bool))
    step = make_eval_step(config, mesh)
    stream = Stream(400, 29)
    return Pass(params, step, stream, table, mesh, windows, device_batch_tokens).score()


@pytest.mark.parametrize("stride", [5, 16])
def test_a_models_score_is_that_of_each_target_with_its_own_context(stride):
    """One forward pass for each target, on exactly the inputs that its window shows it."""
    windows, tokens = sliding_windows(400, T, stride, 150), Stream(400, 29).tokens.astype(int)
    params, apply = init_variables(TINY, jax.random.key(0))[0], jax.jit(forward(TINY))
    nll = []
    for target in range(150):
        start = 0 if target < T else min(math.ceil((target - T + 1) / stride) * stride, 150 - T)
        inputs = np.zeros(T, int)  # one shape, one program; what comes later changes nothing
        inputs[: target - start + 1] = tokens[start : target + 1]
        logits = np.asarray(apply(params, jnp.asarray(inputs[None])))[0, target - start].astype(
            np.float64
        )
        nll.append(np.log(np.exp(logits).sum()) - logits[tokens[target + 1]])
    assert model_score(TINY, windows, 1, 64).loss == pytest.approx(np.mean(nll), rel=1e-6)


@pytest.mark.parametrize(
    ("stride", "dtype", "tolerance"), [(5, "float32", 1e-6), (16, "bfloat16", 1e-3)]
)
def test_devices_change_no_bit_and_batch_sizes_only_rounding(stride, dtype, tolerance):
    config = dataclasses.replace(TINY, compute_dtype=dtype)
    windows = sliding_windows(400, T, stride, 0)
    base = model_score(config, windows, 1, 64)
    for devices in (3, 8):
        assert model_score(config, windows, devices, 64) == base  # four rows a device, as with one
    for devices, device_batch_tokens in ((1, 400), (8, 48)):
        other = model_score(config, windows, devices, device_batch_tokens)
        assert (other.tokens, other.bytes) == (base.tokens, base.bytes)
        assert other.loss == pytest.approx(base.loss, rel=tolerance)
        assert other.bpb == pytest.approx(base.bpb, rel=tolerance)
