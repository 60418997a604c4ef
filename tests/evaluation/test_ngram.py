"""The n-gram caches against literal Python, and what makes a score valid: causality and mass."""

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.ngram import compiled, hashed, tilt
from sngpt_jax.evaluation.ngram.cache import Chunk
from sngpt_jax.evaluation.ngram.score import make_cache
from sngpt_jax.evaluation.windows import Windows
from tests import ngram_oracle

V = 6
MODES = ("hashed5", "backoff", "undercount", "exact", "tilt")
BUCKETS = 64  # so few that n-grams of these streams collide
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch):
    monkeypatch.setattr(hashed, "BUCKETS", BUCKETS)


def stream(length):
    """Tokens that repeat a pattern, of late another one, with some noise: contexts of all lengths
    come back.
    """
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, V, (2, 19))
    tokens = np.array([patterns[int(i > length // 2), i % 19] for i in range(length)])
    noise = rng.random(length) < 0.03
    return np.where(noise, rng.integers(0, V, length), tokens).astype(np.uint16)


def model(tokens):
    """Probabilities [n, V] of a model that knows the last token."""
    return np.random.default_rng(1).dirichlet(np.full(V, 0.5), V)[tokens[:-1]]


def of_targets(p_V, targets):
    return p_V[np.arange(len(p_V)), targets]


def readings(tokens, hints=None):
    """What `model` says of all targets."""
    p, targets = model(tokens), tokens[1:]
    entropy = -(p * np.log(p)).sum(1) + 3  # near 4, where the weight of backoff turns
    nll, mass = -np.log(of_targets(p, targets)), np.ones(len(targets))
    chunk = Chunk(targets, *(a.astype(np.float32) for a in (nll, entropy, mass)))
    if hints is None:
        return chunk
    return chunk._replace(hints=hints, hint_nll=-np.log(of_targets(p, hints)).astype(np.float32))


def probabilities(nll):
    return np.exp(-nll.astype(np.float64))


def part(chunk, start, stop):
    return Chunk(*(a[start:stop] for a in chunk))


def make(mode, tokens, *, first_segment=37, segment=16, memory=2**24):
    undercount = mode == "undercount"
    return make_cache(
        "backoff" if undercount else mode,
        first_token=int(tokens[0]),
        vocab_size=V,
        windows=Windows(len(tokens) - 1, first_segment, segment),
        memory=memory,
        undercount=undercount,
    )


def play(mode, tokens, cuts=(), at=None, **options):
    """Scores of a stream that a new cache is given in parts, or at the positions `at` masses, and
    what it was given.
    """
    cache = make(mode, tokens, **options)
    parts = list(itertools.pairwise([0, *cuts, len(tokens) - 1]))
    hints = cache.hints and np.concatenate([cache.hints(tokens[1:][a:b]) for a, b in parts])
    chunk = readings(tokens, hints)
    found = [
        cache.score(part(chunk, a, b))
        if at is None
        else cache.mass(part(chunk, a, b), at[(a <= at) & (at < b)] - a)
        for a, b in parts
    ]
    return np.concatenate(found), chunk


def hashed_oracle(mode, tokens):
    entropy = readings(tokens).entropy.astype(np.float64)
    options = {"segments": (37, *[16] * 1000), "buckets": BUCKETS}
    return ngram_oracle.hashed_mixture(mode, tokens.tolist(), V, entropy, **options)


def exact_oracle(tokens, room=math.inf):
    """The weights [n] and p_s [n, V]."""
    p = probabilities(readings(tokens).nll)
    found = ngram_oracle.exact(tokens.tolist(), p, V, room=room)
    return tuple(map(np.array, zip(*found, strict=True)))


# --------------------------------------------------------------------------- against literal Python


@pytest.mark.parametrize("mode", ["hashed5", "backoff", "undercount"])
def test_hashed_caches_give_what_the_definition_gives(mode):
    tokens = stream(1500)
    given_V, alpha = hashed_oracle(mode, tokens)
    assert 0 < np.count_nonzero(alpha) < len(alpha)
    scores, chunk = play(mode, tokens)
    p = (1 - alpha) * probabilities(chunk.nll) + alpha * of_targets(given_V, chunk.targets)
    np.testing.assert_allclose(scores, -np.log(np.clip(p, 1e-12, 1)), rtol=1e-12)

    mass, _ = play(mode, tokens, at=np.arange(len(given_V)))
    np.testing.assert_allclose(mass, 1 - alpha + alpha * given_V.sum(1), rtol=1e-12)
    assert mass.mean() > 1.05  # every token inherits what collides with it


@pytest.mark.parametrize("mode", ["hashed5", "backoff"])
def test_a_target_of_almost_no_probability_is_scored_with_1e_12(mode):
    """Whether it was mixed with nothing, or not at all."""
    tokens = np.arange(60).astype(np.uint16) % V
    tokens[-1] = (tokens[-1] + 1) % V  # what never followed its context
    chunk = Chunk(tokens[1:], np.full(59, 60, np.float32), np.zeros(59, np.float32))
    scores = make(mode, tokens, first_segment=1, segment=1).score(chunk)
    assert scores[0] == scores[1] == pytest.approx(-math.log(1e-12))
    assert scores[30] < 5
    assert scores[-1] <= -math.log(1e-12) + 1e-9


def test_published_tables_are_of_4_194_304_buckets(monkeypatch):
    monkeypatch.undo()
    cache = make("hashed5", stream(10))
    tables = cache._counts.tables
    assert tables.shape == (1, 2, 2**22) and tables.dtype == np.uint32
    assert "4,194,304 buckets, 32.0 MiB; not a probability distribution" in cache.about


def test_hashed5_needs_a_context_seen_twice_and_four_tokens_before_the_target():
    """A token that repeats: from index 4 on its context is counted, so index 6 is the first that
    is mixed.
    """
    tokens = np.full(12, 3, np.uint16)
    certain = Chunk(tokens[1:], np.full(11, np.log(10), np.float32))
    mixed = make("hashed5", tokens, first_segment=1, segment=1).score(certain)
    np.testing.assert_allclose(np.exp(-mixed), [0.1] * 5 + [0.8 * 0.1 + 0.2] * 6, rtol=1e-6)
    # counted once the segment is scored
    later = make("hashed5", tokens, first_segment=9, segment=1).score(certain)
    np.testing.assert_allclose(np.exp(-later), [0.1] * 9 + [0.28] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # 30 tokens hold 31 - n n-grams, of which the first token, no target, ends none
        ("backoff", [30 - max(n - 1, 1) for n in range(7, 1, -1)]),
        # two targets are counted at order n before the next one finds it known, then the order
        # above takes over
        ("undercount", [24, 3, 3, 3, 3, 3]),
    ],
)
def test_undercount_keeps_a_mixed_target_from_the_orders_below(mode, expected):
    tokens = np.full(30, 3, np.uint16)
    cache = make(mode, tokens, first_segment=1, segment=1)
    cache.score(Chunk(tokens[1:], np.ones(29, np.float32), np.full(29, 4, np.float32)))
    assert cache._counts.tables[:, 0].max(1).tolist() == expected


# memory for every n-gram, and for 1,024 slots and the root's, of which 682 are for n-grams
@pytest.mark.parametrize(("memory", "room"), [(2**24, math.inf), (16400, 682)])
def test_exact_gives_what_the_definition_gives(memory, room):
    tokens = stream(3000)
    weights, given_V = exact_oracle(tokens, room)
    scores, chunk = play("exact", tokens, memory=memory)
    p = (1 - weights) * probabilities(chunk.nll) + weights * of_targets(given_V, chunk.targets)
    np.testing.assert_allclose(scores, -np.log(p), rtol=1e-12)
    assert scores.mean() < chunk.nll.mean() - 0.3  # and it is worth something here

    cache = make("exact", tokens, memory=memory)
    np.testing.assert_allclose(cache.mass(chunk, np.arange(len(p))), 1, rtol=0, atol=1e-12)
    assert cache.memory_bytes == cache._trie.nodes.nbytes <= memory
    assert (cache._trie.room[0] == 0) == (room == 682)
    said = "682 n-grams; later ones are not counted" if room == 682 else "every n-gram"
    assert cache.about.endswith(f"room for {said}")


def test_exact_stays_a_distribution_over_the_largest_vocabulary():
    """A node has 16 bits for how many tokens followed; of 65,536 it counts all but one."""
    targets, windows = np.arange(2**16).astype(np.uint16), Windows(2**16, 1, 1)
    cache = make_cache("exact", first_token=0, vocab_size=2**16, windows=windows, memory=2**26)
    chunk = Chunk(targets, np.ones(2**16, np.float32), mass=np.ones(2**16, np.float32))
    assert cache.mass(chunk, np.array([2**16 - 1])) == pytest.approx(1, abs=1e-9)
    root = cache._trie.nodes[-1]
    assert (root["distinct"], root["total"]) == (2**16 - 1, 2**16 + 1)
    assert cache.mass(chunk, np.array([0, 2**15])) == pytest.approx(1, abs=1e-9)


def test_hints_are_what_followed_in_four_of_five_cases():
    tokens = stream(3000)
    expected = np.array(ngram_oracle.hints(tokens.tolist()))
    # so many buckets that no two contexts meet in one
    hints = tilt.TiltCache(int(tokens[0]), 2**22).hints(tokens[1:])
    np.testing.assert_array_equal(hints, expected)
    assert 0 < (hints != tokens[1:])[hints >= 0].mean() < 0.5  # noise breaks some
    # sixteen buckets: a context that comes back has mostly been driven out, and hints anew
    full = make("tilt", tokens[:11])
    assert len(full._table) == 16
    assert 0 < (full.hints(tokens[1:]) >= 0).sum() < (expected >= 0).sum()
    # half as many again as there are targets, and a power of two
    assert len(make("tilt", tokens)._table) == 8192


def test_tilt_lifts_the_hint_and_divides_by_the_sum():
    tokens = stream(3000)
    scores, chunk = play("tilt", tokens)
    p_V = model(tokens)
    hinted = chunk.hints >= 0
    p_V[hinted, chunk.hints[hinted]] *= math.exp(2.625)
    p_V /= p_V.sum(1, keepdims=True)
    expected = -np.log(of_targets(p_V, chunk.targets))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scores[~hinted], chunk.nll[~hinted])


# ------------------------------------------------------------------------------------------ honesty


@every_mode
def test_mass_is_the_sum_of_the_scores_of_every_token(mode):
    """The last target is replaced by each token in turn, and scored with the state that all before
    it left.
    """
    for length in (5, 800, 1203):
        tokens = stream(length)
        total = 0.0
        for tokens[-1] in range(V):
            total += math.exp(-play(mode, tokens)[0][-1])
        mass, _ = play(mode, tokens, at=np.array([length - 2]))
        assert mass == pytest.approx(total, rel=1e-6)  # losses are given in float32
        is_distribution = make(mode, tokens).is_distribution
        assert is_distribution == (mode in ("exact", "tilt"))
        assert not is_distribution or mass == pytest.approx(1, abs=1e-9)


@every_mode
def test_what_the_model_lacks_to_one_the_mixture_lacks_in_part(mode):
    """A model whose p sum to 0.9: (1 - w) 0.9 + w Σ p_ng for a mixture; (0.9 + lift) / (1 + lift)
    for the tilt.
    """
    tokens, at = stream(2000), np.arange(0, 1999, 7)
    whole, chunk = play(mode, tokens, at=at)
    cache = make(mode, tokens)
    if cache.hints:
        cache.hints(tokens[1:])
    missing = whole - cache.mass(chunk._replace(mass=np.full(1999, 0.9, np.float32)), at)
    if mode == "tilt":
        q = np.where(chunk.hints >= 0, probabilities(chunk.hint_nll), 0)
        share = 1 / (1 + q * math.expm1(2.625))
    elif mode == "exact":
        share = 1 - exact_oracle(tokens)[0]
    else:
        share = 1 - hashed_oracle(mode, tokens)[1]
    np.testing.assert_allclose(missing, 0.1 * share[at], rtol=1e-6)


@every_mode
@pytest.mark.parametrize("changed", [1, 700, 1190])
def test_a_changed_token_changes_no_score_before_it(mode, changed):
    tokens, other = stream(1200), stream(1200)
    other[changed] = (other[changed] + 1) % V
    (before, chunk), (after, other_chunk) = play(mode, tokens), play(mode, other)
    np.testing.assert_array_equal(before[: changed - 1], after[: changed - 1])
    assert before[changed - 1] != after[changed - 1]
    np.testing.assert_array_equal(chunk.hints[:changed], other_chunk.hints[:changed])


@every_mode
@settings(max_examples=10)
@given(
    cuts=st.lists(st.integers(0, 599), max_size=8).map(sorted),
    first_segment=st.integers(1, 90),
    segment=st.integers(1, 50),
)
def test_how_the_stream_is_cut_changes_nothing(mode, cuts, **segments):
    tokens = stream(600)
    for at in (None, np.arange(0, 599, 5)):
        got, whole = (play(mode, tokens, parts, at, **segments)[0] for parts in (cuts, ()))
        np.testing.assert_array_equal(got, whole)


# -------------------------------------------------------------------------------- what can go wrong


def test_too_little_memory_is_refused():
    wanted = r"1,000 bytes are too little .* give it 16.0 KiB or more \(--ngram-memory 1.6e-05, in"
    with pytest.raises(UserError, match=wanted):
        make("exact", stream(3000), memory=1000)


def test_loops_are_compiled_where_no_folder_can_keep_them(monkeypatch, caplog):
    def njit(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available")
        return function

    monkeypatch.setattr(compiled, "njit", njit)
    with caplog.at_level("INFO", "sngpt_jax"):
        assert compiled.compiled(lambda x: 2 * x)(3) == 6
    assert "no folder for compiled loops" in caplog.text


def test_missing_numba_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for module in ("exact", "compiled"):
        monkeypatch.delitem(sys.modules, f"sngpt_jax.evaluation.ngram.{module}")
    with pytest.raises(UserError, match="exact needs the package numba; .*pip install numba"):
        make("exact", stream(10))
