"""Second moments against the inputs that a numpy model in float64 multiplies its matrices with,
and which text is refused.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh, path_name, state_shardings
from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from sngpt_jax.data.shards import Dataset, Shard, TokenStream
from sngpt_jax.data.tokenizer import NO_CORRECTIONS
from sngpt_jax.evaluation.calibration import second_moments, sum_of_products, training_stream
from sngpt_jax.model.layers import Observed
from tests import oracles
from tests.model import test_pre_norm as pre_norm
from tests.model.test_techniques import changed, random_params

T = 8
MATRICES = {"query", "key", "value", "out", "up", "down", "proj"}


def stream_of(*pieces, vocab_size=29, name=""):
    """A stream with the pieces as shards, named `name` and their number."""
    shards = (Shard(Path(f"{name}{i}"), piece, NO_CORRECTIONS) for i, piece in enumerate(pieces))
    return TokenStream(tuple(shards), vocab_size)


def random_tokens(count, vocab_size=29, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, count).astype(np.uint16)


def moments_of(model, variables, stream, tokens, *, devices=1, fsdp=1, most=2 * T, progress=None):
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    variables = jax.device_put(variables, state_shardings(mesh, variables))
    data, evaluation = DataConfig(seq_len=T), EvalConfig(device_batch_tokens=most)
    config = Config(model=model, data=data, eval=evaluation)
    return second_moments(config, variables, stream, tokens, mesh, progress)


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


class Recording(np.ndarray):
    """A numpy matrix that keeps the left factors of its products."""

    def __rmatmul__(self, x):
        self.inputs.append(x)
        return x @ self.view(np.ndarray)


def recorded(variables, run):
    """{path: second moment} of all matrices, from a numpy model `run` that computes with them."""
    found = {}

    def wrap(path, leaf):
        leaf = np.asarray(leaf, np.float64 if leaf.dtype == jnp.float32 else None)
        if path_name(path).split("/")[-1] not in MATRICES:
            return leaf
        found[path_name(path)] = matrix = leaf.view(Recording)
        matrix.inputs = []
        return matrix

    run(jax.tree_util.tree_map_with_path(wrap, variables))
    inputs = {
        path: np.concatenate([x.reshape(-1, x.shape[-1]) for x in matrix.inputs])
        for path, matrix in found.items()
    }
    return {path: x.T @ x / len(x) for path, x in inputs.items()}


# -------------------------------------------------------------------------------------- the moments


COMPACT = {
    "plain": {},
    "recycled": {"recycle_layers": (1, 0, 1)},
    "tables": {
        "bigram_buckets": 13,
        "bigram_dim": 5,
        "value_embed_layers": (3, 1),
        "value_embed_dim": 7,
        "smear": "before_norm",
    },
    "the rest": {
        "value_residual": True,
        "attention_gate": True,
        "xsa_layers": 2,
        "ln_scale": True,
        "rope_dims": 4,
    },
}


@pytest.mark.parametrize("name", [*COMPACT, *pre_norm.VARIANTS])
def test_every_matrix(name):
    if name in COMPACT:
        model, oracle, vocab_size = changed(**COMPACT[name]), oracles.gpt, 29
        variables = random_params(model)
    else:
        model, oracle, vocab_size = pre_norm.VARIANTS[name], pre_norm.oracle, 61
        variables = pre_norm.random_variables(model)
    tokens = random_tokens(3 * T, vocab_size)
    got = moments_of(model, variables, stream_of(tokens, vocab_size=vocab_size), 3 * T)
    want = recorded(variables, lambda p: oracle(model, p, tokens.reshape(3, T)))
    assert set(got) == set(want)
    assert name not in COMPACT or len(got) == 6 * 4 + 2 * (name == "tables")
    for path in want:
        close(got[path], want[path])


WIDE = ModelConfig(
    vocab_size=29,
    num_layers=1,
    d_model=64,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=80,
    max_seq_len=T,
    compute_dtype="float32",
)


def test_batches_and_devices_change_nothing():
    """Eleven windows: one by one, in twos with a row to spare, and with idle devices; weights
    whole and spread.
    """
    params = random_params(WIDE)
    stream = stream_of(random_tokens(6 * T), random_tokens(6 * T, seed=1))
    one = moments_of(WIDE, params, stream, 11 * T, most=T)
    for layout in ({}, {"devices": 3}, {"devices": 8, "fsdp": 4}):
        other = moments_of(WIDE, params, stream, 11 * T, **layout)
        assert set(other) == set(one)
        for path in one:
            close(other[path], one[path], 1e-6)


def test_windows_are_whole_and_from_the_start():
    params, tokens = random_params(WIDE), random_tokens(12 * T)
    whole, seen = stream_of(tokens), []
    got = moments_of(WIDE, params, whole, 6 * T - 1, progress=lambda *counts: seen.append(counts))
    short = moments_of(WIDE, params, stream_of(tokens[: 5 * T]), 5 * T)
    longer = moments_of(WIDE, params, whole, 6 * T)
    for path in got:
        np.testing.assert_array_equal(got[path], short[path])
        assert np.abs(got[path] - longer[path]).max() > 1e-4
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_moments_are_symmetric_definite_and_shared():
    model = changed(num_layers=2)
    got = moments_of(model, random_params(model), stream_of(random_tokens(20 * T)), 20 * T)
    for path, moment in got.items():
        assert moment.dtype == np.float64
        np.testing.assert_array_equal(moment, moment.T, err_msg=path)
        eigenvalues = np.linalg.eigvalsh(moment)
        assert eigenvalues[0] > -1e-6 * eigenvalues[-1] and eigenvalues[-1] > 0, path
    for layer in (0, 1):
        query, key, value, out = (
            got[f"blocks/{layer}/attn/{name}"] for name in ("query", "key", "value", "out")
        )
        assert query is key is value and out is not query
    assert len({id(moment) for moment in got.values()}) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_not_rounded_to_the_compute_dtype(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 500, 9)) + 1, dtype)
    counted = np.array([True, False, True, True, False, True])
    got = jax.jit(sum_of_products)(x, jnp.asarray(counted))
    rows = np.asarray(x, np.float64)[counted].reshape(-1, 9)
    assert got.dtype == jnp.float32
    close(got, rows.T @ rows)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, matrix: x @ matrix,
        jnp.dot,
        lambda x, matrix: jnp.einsum("ij,jk->ik", x, matrix),
        lambda x, matrix: x * matrix,
        lambda x, matrix: matrix.T,
    ],
)
def test_an_observed_matrix_cannot_be_used_unseen(use):
    """A model that takes its matrices in another way must not seem to be calibrated."""
    with pytest.raises((TypeError, ValueError, AttributeError)):
        use(jnp.ones((2, 3)), Observed(jnp.ones((3, 4)), []))


@pytest.mark.parametrize("tokens", [T - 1, 5 * T + 1])
def test_numbers_of_tokens_that_do_not_fit_are_refused(tokens):
    wanted = f"^export.gptq_tokens = {tokens} .* data.seq_len = 8, and the 40 tokens"
    with pytest.raises(UserError, match=wanted):
        moments_of(WIDE, random_params(WIDE), stream_of(random_tokens(5 * T)), tokens)


# --------------------------------------------------------------------------------------- which text


FIRST, SECOND, HELD_OUT, OTHER = (random_tokens(5000, seed=seed) for seed in range(4))


def dataset_of(train, val):
    """A data set with shards of the tokens `train` and `val`, named train0 … and val0 …"""
    streams = stream_of(*train, name="train"), stream_of(*val, name="val")
    return Dataset(Path(), *streams, tokenizer=None, manifest=None)


@pytest.mark.parametrize(
    "leaked",
    [
        HELD_OUT,
        HELD_OUT[:300],
        np.concatenate([HELD_OUT, OTHER]),
        np.concatenate([HELD_OUT[:1024], OTHER]),
    ],
    ids=["copy", "cut", "longer", "beginning"],
)
def test_validation_text_is_refused(leaked):
    for number, train in ((0, [leaked]), (0, [leaked, FIRST]), (1, [FIRST, leaked])):
        wanted = f"train{number}: .*the text of the validation shard val1"
        with pytest.raises(UserError, match=wanted):
            training_stream(dataset_of(train, [SECOND, HELD_OUT]), 5001)


def test_other_text_and_shards_that_are_not_read_are_taken():
    other = np.concatenate([HELD_OUT[:1023], (HELD_OUT[1023:] + 1) % 29])
    for train, tokens in (([FIRST, SECOND], 9000), ([other], 5000), ([FIRST, HELD_OUT], 5000)):
        dataset = dataset_of(train, [HELD_OUT])
        assert training_stream(dataset, tokens) is dataset.train
