"""Smear, bigram hashes and value embeddings: formulas, exact integers, causality, silence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.model.embeddings import (
    BigramHash,
    LearnedPositions,
    SmearGate,
    TiedEmbedding,
    ValueEmbedding,
    hash_sum,
    hash_xor,
)
from sngpt_jax.model.forward import losses
from sngpt_jax.model.layers import weighted
from tests import oracles
from tests.model.test_techniques import (
    BIGRAM,
    TINY,
    TOKENS,
    VALUE_EMBED,
    changed,
    functional,
    initial_params,
    logits,
    random_params,
)

HASHES = [(hash_xor, oracles.hash_xor), (hash_sum, oracles.hash_sum)]
RNGS = nnx.Rngs(params=jax.random.key(0))
X = np.random.default_rng(0).normal(size=(*TOKENS.shape, TINY.d_model))
near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)


def replaced(params, part, **leaves):
    """`params` with other leaves of one embedding."""
    return {**params, part: {**params[part], **leaves}}


# ------------------------------------------------------------------------------ tables

ROUNDED = changed(**BIGRAM, **VALUE_EMBED, compute_dtype="bfloat16", max_seq_len=4096)
FREQUENT = np.where(np.arange(4096) % 4 < 3, 5, np.arange(4096) % TINY.vocab_size)[None]


def rows_of(module):
    """The vectors that a module's table gives for `FREQUENT`, where a row occurs 3,072 times."""
    ids = jnp.asarray(FREQUENT)
    if isinstance(module, TiedEmbedding):
        return module.encode(ids)
    if isinstance(module, LearnedPositions):
        zeros = jnp.zeros((FREQUENT.size, 1, TINY.d_model), jnp.bfloat16)
        return module(zeros, ids[0])
    rows = module(ids)
    return rows if isinstance(module, BigramHash) else rows[module.layers[0]]


@pytest.mark.parametrize("kind", [TiedEmbedding, LearnedPositions, BigramHash, ValueEmbedding])
def test_gradient_of_a_frequent_row_is_the_float64_sum(kind):
    graph, state = nnx.split(kind(ROUNDED, rngs=RNGS))
    params = jax.tree.map(jnp.ones_like, nnx.to_pure_dict(state))
    if "proj" in params:  # the first columns of the table are the first of the result
        params["proj"] = jnp.eye(*params["proj"].shape)

    rows, pullback = jax.vjp(lambda p: rows_of(nnx.merge(graph, p)), params)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, rows.shape), rows.dtype)
    gradient = pullback(weights)[0]["table"]
    assert rows.dtype == jnp.bfloat16 and gradient.dtype == jnp.float32

    uses = np.asarray(weights, np.float64).reshape(FREQUENT.size, -1)[:, : gradient.shape[1]]
    total = np.asarray(gradient, np.float64)[:, : uses.shape[1]].sum(axis=0)
    np.testing.assert_allclose(total, uses.sum(axis=0), rtol=1e-5)


def test_gradients_of_scalars_and_gates_add_in_float32():
    """A sum of 4,096 equal terms in bfloat16 would stop at 256."""
    ones = jnp.ones((1, 4096, TINY.d_model), jnp.bfloat16)
    gradient = jax.grad(lambda w: jnp.sum(weighted(w, ones).astype(jnp.float32)))
    assert gradient(jnp.float32(0.5)) == ones.size
    per_channel = gradient(jnp.full((1, 1, TINY.d_model), 0.5))
    assert np.array_equal(per_channel[0, 0], np.full(TINY.d_model, 4096))
    positions = LearnedPositions(ROUNDED, rngs=RNGS)
    graph, state = nnx.split(positions)
    many = jnp.ones((4096, 1, TINY.d_model), jnp.bfloat16)
    rows = jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(many).astype(jnp.float32)))(state)
    assert np.array_equal(rows["table"][...][0], np.full(TINY.d_model, 4096))


# ------------------------------------------------------------------------------ smear


def smear_of(masked):
    return functional(SmearGate(changed(smear="after_norm", smear_mask_bos=masked)))


@pytest.mark.parametrize("masked", [False, True])
def test_smear_equals_the_formula(masked):
    fn, params = smear_of(masked)
    starts = TOKENS == TINY.bos_id if masked else None
    oracles.check(
        lambda p, x: fn(p, x, TOKENS), lambda p, x: oracles.smear(x, p["gate"], starts), params, X
    )


def test_gate_is_the_share_of_the_previous_position():
    fn, params = smear_of(False)
    x = jnp.asarray(X, jnp.float32)
    closed, open_ = ({"gate": jnp.full_like(params["gate"], value)} for value in (-200.0, 200.0))
    assert np.array_equal(fn(closed, x, TOKENS), x)
    assert np.array_equal(fn(open_, x, TOKENS)[:, 1:], x[:, :-1])
    assert not np.any(fn(open_, x, TOKENS)[:, 0])


def test_a_masked_document_takes_nothing_from_the_one_before():
    fn, params = smear_of(True)
    out = fn(params, jnp.asarray(X, jnp.float32), TOKENS)
    share = 1 - oracles.sigmoid(np.asarray(params["gate"]))
    np.testing.assert_allclose(out[:, 4], share * X[:, 4], rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_smear_reads_its_own_and_the_previous_position_alone(masked):
    fn, params = smear_of(masked)
    of_sum = jax.jacobian(lambda x: fn(params, x, TOKENS[:1])[0].sum(-1))
    jacobian = of_sum(jnp.asarray(X[:1], jnp.float32))
    reads = np.any(jacobian[:, 0] != 0, axis=-1)  # [T out, T in]
    own, previous = (np.eye(TOKENS.shape[1], k=k, dtype=bool) for k in (0, -1))
    if masked:
        previous[TOKENS[0] == TINY.bos_id] = False
    assert np.array_equal(reads, own | previous)


@pytest.mark.parametrize("order", ["after_norm", "before_norm"])
def test_model_with_a_closed_smear_is_the_plain_one(order):
    params = {**random_params(TINY), "smear": {"gate": jnp.full(TINY.d_model, -200.0)}}
    near(logits(changed(smear=order), params), logits(TINY))


# ------------------------------------------------------------------------------ bigram


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 65535), min_size=5, max_size=5),
    buckets=st.one_of(st.integers(2, 65536), st.sampled_from([2, 3, 2048, 4096, 65535, 65536])),
)
@pytest.mark.parametrize(("ours", "oracle"), HASHES)
def test_hash_equals_exact_integers(ours, oracle, tokens, buckets):
    got = ours(jnp.asarray([tokens], jnp.int32), buckets)
    assert got.dtype == jnp.int32
    assert np.array_equal(got, oracle([tokens], buckets))
    assert np.all((got >= 0) & (got < buckets))


@pytest.mark.parametrize(("ours", "oracle"), HASHES)
@pytest.mark.parametrize("buckets", [2048, 3000, 65521, 65536])
def test_hash_of_the_largest_tokens(ours, oracle, buckets):
    """Products beyond 2^31: int32 wraps in the xor hash, and the sum is exact."""
    tokens = np.array([[65535, 65535, 65535, 65534, 0, 65535, 59140, 65520, 65520, 1]])
    assert np.array_equal(ours(jnp.asarray(tokens, jnp.int32), buckets), oracle(tokens, buckets))


def test_hashes_of_two_tokens_by_hand():
    """36313·5 = 181565 and 27191·3 = 81573 differ in the bits of 261016 = 2047·127 + 1047."""
    tokens = jnp.asarray([[3, 5]])
    assert hash_xor(tokens, 2048).tolist() == [[2047, 1047]]
    assert hash_sum(tokens, 4096).tolist() == [[3347, 2842]]


@pytest.mark.parametrize("shape", [(3, 1), (1, 64), (4, 16)])
def test_the_reserved_bucket_is_the_first_positions_alone(shape):
    tokens = np.random.default_rng(0).integers(0, 65536, shape)
    for buckets in (2, 5, 2048):
        reserved = np.asarray(hash_xor(jnp.asarray(tokens), buckets)) == buckets - 1
        assert np.all(reserved[:, 0]) and not np.any(reserved[:, 1:])


@pytest.mark.parametrize(("ours", "oracle"), HASHES)
def test_hash_does_not_depend_on_the_tokens_dtype(ours, oracle):
    tokens = np.array([[65535, 40000, 7]], np.uint16)
    assert np.array_equal(ours(jnp.asarray(tokens), 4096), oracle(tokens, 4096))


@pytest.mark.parametrize(("ours", "oracle"), HASHES)
def test_hash_reads_its_own_and_the_previous_token_in_their_order(ours, oracle):
    base = np.asarray(ours(jnp.asarray(TOKENS), 4096))
    for at in range(TOKENS.shape[1]):
        moved = TOKENS.copy()
        moved[:, at] = 23
        same = np.asarray(ours(jnp.asarray(moved), 4096)) == base
        assert np.all(np.delete(same, [at, at + 1][: TOKENS.shape[1] - at], axis=1))
        assert at + 1 == TOKENS.shape[1] or not np.any(same[:, at + 1])
    assert ours(jnp.asarray([[2, 9]]), 4096)[0, 1] != ours(jnp.asarray([[9, 2]]), 4096)[0, 1]


@pytest.mark.parametrize(
    "fields", [{}, {"bigram_hash": "sum"}, {"bigram_hash": "sum", "bigram_scale_init": 0.0}]
)
def test_bigram_equals_the_formula(fields):
    config = changed(**BIGRAM, **fields)
    fn, params = functional(BigramHash(config, rngs=RNGS))
    assert ("scale" in params) == (fields.get("bigram_scale_init") != 0.0)
    oracles.check(lambda p: fn(p, TOKENS), lambda p: oracles.bigram(config, p, TOKENS), params)


@pytest.mark.parametrize("silenced", ["table", "scale"])
def test_model_with_a_silent_bigram_is_the_plain_one(silenced):
    config = changed(**BIGRAM)
    params = random_params(config)
    silent = replaced(params, "bigram", **{silenced: 0.0 * params["bigram"][silenced]})
    assert np.array_equal(logits(config, silent), logits(TINY))


def test_bigram_is_silent_at_the_start_and_learns():
    """The table is zero, its projection is not: were both, no gradient would reach either."""
    config = changed(**BIGRAM)
    params = initial_params(config)
    assert not np.any(params["bigram"]["table"])

    def loss(table):
        moved = replaced(params, "bigram", table=table)
        return losses(config)(moved, TOKENS[:, :-1], TOKENS[:, 1:]).mean()

    assert np.any(jax.jit(jax.grad(loss))(params["bigram"]["table"]))


# ------------------------------------------------------------------------------ value embedding


def test_value_embedding_equals_the_formula():
    config = changed(**VALUE_EMBED)
    fn, params = functional(ValueEmbedding(config, rngs=RNGS))
    layers = config.value_embed_layers
    assert fn(params, TOKENS).keys() == set(layers)

    def oracle(p):
        found = oracles.value_embedding(config, p, TOKENS)
        return np.stack([found[layer] for layer in layers])

    oracles.check(lambda p: jnp.stack([fn(p, TOKENS)[layer] for layer in layers]), oracle, params)


@pytest.mark.parametrize("silenced", ["table", "proj", "scale", "layer_scale"])
def test_model_with_a_silent_value_embedding_is_the_plain_one(silenced):
    config = changed(**VALUE_EMBED)
    params = random_params(config)
    silent = replaced(params, "value_embed", **{silenced: 0.0 * params["value_embed"][silenced]})
    near(logits(config, silent), logits(TINY))


def test_each_scale_belongs_to_its_layer():
    """With the scale of one layer zero, the model is the one that embeds at the other alone."""
    config = changed(**VALUE_EMBED)
    params = random_params(config)
    scale = params["value_embed"]["layer_scale"]
    for j, other in ((0, 1), (1, 3)):
        silent = replaced(params, "value_embed", layer_scale=scale.at[j].set(0.0))
        alone = replaced(params, "value_embed", layer_scale=scale[1 - j][None])
        single = changed(value_embed_layers=(other,), value_embed_dim=config.value_embed_dim)
        near(logits(config, silent), logits(single, alone))
