"""Hashed n-gram caches as published: `hashed5` and `backoff`, the two versions of parameter-golf's
PR #740.

Each order n has two tables of counts with 2²² buckets. With the tokens x and the primes P, target
x_j falls into

    context = h & mask,  full = (h ^ x_j P_{n-1}) & mask
    h = XOR over k = 0 … n-2 of x_{j-n+1+k} P_k  (64 bits)

If C[context] ≥ 2, p_ng = min(F[full], C[context]) / C[context] is mixed in. The n-grams of one
bucket are not told apart, so the sum of p_ng over the vocabulary is not 1.
"""

from typing import Any, NamedTuple

import numpy as np

from sngpt_jax.evaluation.ngram.cache import Chunk, in_bytes
from sngpt_jax.evaluation.ngram.compiled import compiled

BUCKETS = 2**22
PRIMES = np.array([36313, 27191, 51647, 81929, 131071, 65537, 104729], np.uint64)
MIN_COUNT = 2  # a context with fewer counts gives no p_ng
FLOOR = 1e-12  # least probability a target is scored with


class _Counts(NamedTuple):
    """The state that the compiled loops change, for O orders."""

    orders: np.ndarray  # int64 [O], the first order to try first
    tables: np.ndarray  # uint32 [O, 2, BUCKETS], counts of contexts and of whole n-grams
    buckets: np.ndarray  # int32 [segment, O, 2], of the targets so far; -1: not to be counted
    found: np.ndarray  # uint32 [segment, O, 2], the counts in these buckets
    progress: np.ndarray  # int64 [2], scored targets of the segment, and its length
    segment: int
    undercount: bool
    vocab_size: int


class HashedCache:
    """The longest n-gram whose context was counted twice gives p_ng, and p ← (1 - α) p + α p_ng.

    The order is 5 and α is 0.2. With `backoff` the orders are 7 to 2, and α is
    0.05 + 0.55 σ(2 (H - 4)) for a model's entropy of H nats. Targets are counted at every order
    once their segment is scored: the first `first_segment` targets, then `segment` at a time. With
    `undercount`, as published, a target that was mixed at some order is not counted at lower ones.
    """

    hints = None
    is_distribution = False

    def __init__(
        self,
        first_token: int,
        vocab_size: int,
        first_segment: int,
        segment: int,
        backoff: bool,
        undercount: bool,
    ):
        orders = np.arange(7, 1, -1) if backoff else np.array([5])
        self.readings: tuple[str, ...] = ("entropy",) if backoff else ()
        self._recent = np.array([first_token], np.uint16)  # the tokens that contexts may need
        shape = (max(first_segment, segment), len(orders), 2)
        arrays = (
            orders,
            np.zeros((len(orders), 2, BUCKETS), np.uint32),
            np.empty(shape, np.int32),
            np.empty(shape, np.uint32),
            np.array([0, first_segment]),
        )
        self._counts = _Counts(*arrays, segment, undercount, vocab_size)
        self.memory_bytes = sum(array.nbytes for array in arrays)
        name = "7- to 2-grams, the longest known context first" if backoff else "5-grams"
        self.about = (
            f"{name}{', under-counted as published' if undercount else ''}, in {2 * len(orders)}"
            f" hashed tables of {BUCKETS:,} buckets, {in_bytes(self.memory_bytes)}; not a"
            " probability distribution"
        )

    def score(self, chunk: Chunk) -> np.ndarray:
        alpha, given, _ = self._advance(chunk, np.empty(0, np.int64))
        p = np.exp(-chunk.nll.astype(np.float64))
        return -np.log(np.clip((1 - alpha) * p + alpha * given, FLOOR, 1.0))

    def mass(self, chunk: Chunk, at: np.ndarray) -> np.ndarray:
        """See `Cache.mass`; before probabilities under 1e-12 are raised to it."""
        alpha, _, sums = self._advance(chunk, at)
        return (1 - alpha[at]) * chunk.mass[at] + alpha[at] * sums

    def _advance(self, chunk: Chunk, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """α [n], 0 where no order knows the context, and what `_score_and_count` gives."""
        before, tokens = len(self._recent), np.concatenate([self._recent, chunk.targets])
        self._recent = tokens[-(int(self._counts.orders.max()) - 1) :]
        given, sums = _score_and_count(self._counts, tokens, before, at)
        alpha: Any = 0.2
        if self.readings:
            alpha = 0.05 + 0.55 / (1 + np.exp(-2 * (chunk.entropy.astype(np.float64) - 4)))
        return np.where(given >= 0, alpha, 0), given, sums


@compiled
def _score_and_count(
    state: _Counts, tokens: np.ndarray, before: int, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """p_ng of each target [n], -1 where no order knows the context, and at `at` [k] its sums over
    the vocabulary. Each segment is read first, so that the reads overlap.
    """
    orders, tables, buckets, found = state.orders, state.tables, state.buckets, state.found
    given, sums = np.full(len(tokens) - before, -1.0), np.zeros(len(at))
    scored, length = state.progress
    first, asked = before, 0
    while first < len(tokens):
        rows = min(length - scored, len(tokens) - first)
        _read(state, tokens[: first + rows], first, scored)
        for i in range(scored, scored + rows):
            t = first + i - scored
            wanted = asked < len(at) and at[asked] == t - before
            for o in range(len(orders)):
                count, full = found[i, o]
                if count >= MIN_COUNT:
                    given[t - before] = min(full, count) / count
                    if wanted:
                        sums[asked] = _sum(state, o, count, buckets[i, o, 1], tokens[t])
                    if state.undercount:
                        buckets[i, o + 1 :] = -1
                    break
            asked += wanted
        first, scored = first + rows, scored + rows
        if scored == length:
            for o in range(len(orders)):
                for i in range(scored):
                    if buckets[i, o, 0] >= 0:
                        for kind in range(2):
                            tables[o, kind, buckets[i, o, kind]] += np.uint32(1)
            scored, length = 0, state.segment
    state.progress[0], state.progress[1] = scored, length
    return given, sums


@compiled
def _read(state: _Counts, tokens: np.ndarray, first: int, scored: int) -> None:
    """Writes the `buckets` of the targets from `first` on, and the counts `found` in them: 0 where
    too few tokens come before.
    """
    buckets, found = state.buckets[scored:], state.found[scored:]
    mask = np.uint64(state.tables.shape[2] - 1)
    for o in range(len(state.orders)):
        n = state.orders[o]
        for t in range(first, len(tokens)):
            if t < n - 1:
                buckets[t - first, o] = -1
                found[t - first, o] = 0
                continue
            h = np.uint64(0)
            for k in range(n - 1):
                h ^= np.uint64(tokens[t - n + 1 + k]) * PRIMES[k]
            context, full = h & mask, (h ^ (np.uint64(tokens[t]) * PRIMES[n - 1])) & mask
            buckets[t - first, o, 0], buckets[t - first, o, 1] = context, full
            found[t - first, o, 0] = state.tables[o, 0, context]
            found[t - first, o, 1] = state.tables[o, 1, full]


@compiled
def _sum(state: _Counts, o: int, count: int, bucket: int, token: int) -> float:
    """Σ over v of min(F, C) / C, with v in place of `token`, whose `bucket` is given."""
    fulls, prime = state.tables[o, 1], PRIMES[state.orders[o] - 1]
    mask = np.uint64(len(fulls) - 1)
    h = np.uint64(bucket) ^ (np.uint64(token) * prime)  # the lowest bits of the context's h
    total = 0.0
    for v in range(state.vocab_size):
        total += min(fulls[(h ^ (np.uint64(v) * prime)) & mask], count) / count
    return total
