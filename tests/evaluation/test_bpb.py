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
from sngpt_jax.evaluation.bpb import Pass, add_in_order
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import sliding_windows, standard_windows
from sngpt_jax.model.forward import forward, init_variables
from tests.evaluation.test_windows import Stream, literal

V, T = 29, 16
BYTES = TokenBytes(np.arange(V, dtype=np.int32), np.ones(V, bool), np.arange(V) == 0)


def fake_loss(position, first, target):
    """A loss that depends on the target, the window's first token and the place in it."""
    return (0.1 * target + 0.01 * first + 0.001 * position).astype(np.float32)


def fake_eval_step(variables, batch):
    inputs, targets = (np.asarray(batch[name], np.float64) for name in ("inputs", "targets"))
    offsets = np.asarray(batch.get("offsets", np.zeros(len(inputs))))
    position = offsets[:, None] + np.arange(targets.shape[1])
    return {"nll": fake_loss(position, inputs[:, :1], targets)}


def scoring(windows, step=fake_eval_step, length=1001, devices=1, most=64, progress=None, **given):
    mesh, stream = make_mesh(jax.devices()[:devices]), Stream(length, V)
    return Pass(given.get("params"), step, stream, BYTES, mesh, windows, most, progress)


@pytest.mark.parametrize(
    ("length", "seq_len", "stride", "tail"),
    [
        *((length, T, S, "full") for length, T, S in [(9, 8, 8), (100, 1, 1), (257, 8, 8)]),
        *((102, 8, stride, "full") for stride in (1, 3, 5)),
        (45, 8, 2, "published"),
    ],
)
def test_scores_equal_a_literal_loop(length, seq_len, stride, tail):
    """In exact arithmetic but for the losses."""
    windows = sliding_windows(length, seq_len, stride, 0, tail)
    got = scoring(windows, length=length).score()
    tokens = Stream(length, V).tokens.astype(np.float64)
    pairs = literal(length - 1, seq_len, stride, tail)
    nll = math.fsum(fake_loss(p, tokens[s], tokens[s + p + 1]) for s, p in pairs)
    size = sum(tokens[s + p + 1] + (tokens[s + p] != 0) for s, p in pairs)
    expected = nll / len(pairs), nll / math.log(2) / size, len(pairs), size
    assert (got.loss, got.bpb, got.tokens, got.bytes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("devices", "device_batch_tokens"), [(1, 8), (1, 24), (8, 8), (8, 16), (3, 10_000)]
)
@pytest.mark.parametrize("stride", [3, 8])
def test_batching_changes_nothing(devices, device_batch_tokens, stride):
    windows = sliding_windows(1001, 8, stride, 0)
    got = scoring(windows, devices=devices, most=device_batch_tokens)
    assert got.score() == scoring(windows).score()


def test_a_sum_is_float64_and_does_not_depend_on_how_it_is_cut():
    ones = np.ones(2**24, np.float32)  # and one more, which float32 would lose
    assert add_in_order(add_in_order(0.0, ones), ones[:1]) == 2**24 + 1
    values = np.random.default_rng(0).lognormal(sigma=9, size=1000)
    totals = set()
    for pieces in (1, 7, 1000):
        total = 0.0
        for piece in np.array_split(values, pieces):
            total = add_in_order(total, piece)
        totals.add(total)
    assert len(totals) == 1 and totals.pop() == pytest.approx(math.fsum(values), rel=1e-13)


def test_progress_counts_rows():
    seen = []
    windows = standard_windows(100, 8, 0)
    scoring(windows, length=100, most=40, progress=lambda *counts: seen.append(counts)).score()
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_hints_are_asked_for_in_the_order_of_the_targets():
    asked, sent = [], []

    def hints(targets):
        asked.extend(targets.tolist())
        return np.where(targets % 2, targets.astype(np.int32), -1)

    def step(variables, batch):
        sent.append(np.asarray(batch["hints"]))
        return {"nll": sent[-1].astype(np.float32)}

    windows = sliding_windows(60, 8, 3, 0)
    found = list(scoring(windows, step, 60, devices=2, most=24).readings(hints))
    targets, given, read = (
        np.concatenate([piece[name] for piece in found]) for name in ("targets", "hints", "nll")
    )
    assert asked == targets.tolist() == Stream(60, V).tokens[1:].tolist()
    assert sent[0].shape == (6, 3)
    np.testing.assert_array_equal(given, np.where(targets % 2, targets.astype(int), -1))
    # nothing is asked of the model where there is no hint
    np.testing.assert_array_equal(read, np.maximum(given, 0))


# --------------------------------------------------------------------------------------- of a model

TINY = ModelConfig(
    vocab_size=V,
    num_layers=2,
    d_model=32,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=48,
    max_seq_len=T,
    embed_init_std=0.7,
)
PARAMS = jax.jit(lambda key: init_variables(TINY, key)[0])


def model_score(config, windows, devices, most):
    step = make_eval_step(config, make_mesh(jax.devices()[:devices]))
    params = PARAMS(jax.random.key(0))
    return scoring(windows, step, 400, devices, most, params=params).score()


@pytest.mark.parametrize("stride", [5, 16])
def test_a_models_score_is_that_of_each_target_with_its_own_context(stride):
    """One forward pass for each target, on exactly the inputs that its window shows it."""
    windows, tokens = sliding_windows(400, T, stride, 150), Stream(400, V).tokens.astype(int)
    params, apply = PARAMS(jax.random.key(0)), jax.jit(forward(TINY))
    nll = []
    for start, position in literal(150, T, stride, "full"):
        inputs = np.zeros(T, int)  # one shape, one program; what comes later changes nothing
        inputs[: position + 1] = tokens[start : start + position + 1]
        logits = np.asarray(apply(params, jnp.asarray(inputs[None])), np.float64)[0, position]
        nll.append(np.log(np.exp(logits).sum()) - logits[tokens[start + position + 1]])
    assert model_score(TINY, windows, 1, 64).loss == pytest.approx(np.mean(nll), rel=1e-6)


@pytest.mark.parametrize(
    ("stride", "dtype", "tolerance"), [(5, "float32", 1e-6), (16, "bfloat16", 1e-3)]
)
def test_devices_change_no_bit_and_batch_sizes_only_rounding(stride, dtype, tolerance):
    config = dataclasses.replace(TINY, compute_dtype=dtype)
    windows = sliding_windows(400, T, stride, 0)
    base = model_score(config, windows, 1, 64)
    for devices in (3, 8):
        assert model_score(config, windows, devices, 64) == base  # four rows per device, as with 1
    for devices, most in ((1, 400), (8, 48)):
        other = model_score(config, windows, devices, most)
        assert (other.tokens, other.bytes) == (base.tokens, base.bytes)
        assert (other.loss, other.bpb) == pytest.approx((base.loss, base.bpb), rel=tolerance)
