"""The n-gram caches once more: dictionaries and Python's integers, nothing shared with the caches
but the definitions.

Each function plays a stream of `tokens`, the first of which is no target, and says for every
target what the cache gives each token of the vocabulary, before the target itself is counted.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

PRIMES = (36313, 27191, 51647, 81929, 131071, 65537, 104729)


def hashed(
    tokens: Sequence[int],
    vocab_size: int,
    *,
    orders: Sequence[int],
    segments: Sequence[int],
    buckets: int,
    undercount: bool = False,
) -> list[list[float] | None]:
    """p_ng of every token at each target, None where no order applies; `segments` are their
    lengths, one after the other.
    """
    contexts: dict[int, Counter[int]] = {n: Counter() for n in orders}
    fulls: dict[int, Counter[int]] = {n: Counter() for n in orders}

    def places(j: int, n: int, v: int) -> tuple[int, int]:
        h = 0
        for k in range(n - 1):
            h ^= tokens[j - n + 1 + k] * PRIMES[k]
        return h % buckets, (h ^ v * PRIMES[n - 1]) % buckets

    given: list[list[float] | None] = []
    j = 1
    for length in segments:
        mixed_at: dict[int, int] = {}
        stop = min(j + length, len(tokens))
        for t in range(j, stop):
            found = None
            for n in sorted(orders, reverse=True):
                if found is None and t >= n - 1 and (count := contexts[n][places(t, n, 0)[0]]) >= 2:
                    found = [
                        min(fulls[n][places(t, n, v)[1]], count) / count for v in range(vocab_size)
                    ]
                    mixed_at[t] = n
            given.append(found)
        for t in range(j, stop):
            for n in orders:
                if t >= n - 1 and not (undercount and n < mixed_at.get(t, 0)):
                    context, full = places(t, n, tokens[t])
                    contexts[n][context] += 1
                    fulls[n][full] += 1
        j = stop
    assert j == len(tokens), "the segments end before the stream does"
    return given


def hashed_mixture(
    mode: str, tokens: Sequence[int], vocab_size: int, entropy: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """p_ng [n, V] of hashed5, backoff, or backoff with undercount, and its weight [n], 0 where no
    order applies, beside a model of the `entropy` [n].
    """
    orders, alpha = (5,), np.full(len(entropy), 0.2)
    if mode != "hashed5":
        orders, alpha = range(2, 8), 0.05 + 0.55 / (1 + np.exp(-2 * (entropy - 4)))
    undercount = mode == "undercount"
    found = hashed(tokens, vocab_size, orders=orders, undercount=undercount, **options)
    known = np.array([given is not None for given in found])
    return np.array([given or [0.0] * vocab_size for given in found]), np.where(known, alpha, 0)


def exact(
    tokens: Sequence[int],
    p: Sequence[float],
    vocab_size: int,
    *,
    start: float = 0.05,
    start_count: float = 100,
    room: float = math.inf,
) -> list[tuple[float, list[float]]]:
    """The weight w and Witten-Bell's p of every token at each target; `p` are the model's
    probabilities of the targets.

    No more than `room` n-grams are stored, the shortest of a target first.
    """
    following: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    stored: set[tuple[int, ...]] = {()}
    weights: defaultdict[int, float] = defaultdict(lambda: start)
    scored: Counter[int] = Counter()

    def count(t: int) -> None:
        for n in range(1, 8):
            gram = tuple(tokens[max(t + 1 - n, 0) : t + 1])
            if (
                len(gram) == n
                and gram[:-1] in stored
                and (gram in stored or len(stored) - 1 < room)
            ):
                stored.add(gram)
                following[gram[:-1]][gram[-1]] += 1

    given = []
    count(0)
    for t in range(1, len(tokens)):
        probability, length = [1 / vocab_size] * vocab_size, 0
        for k in range(min(6, t) + 1):
            after = following[tuple(tokens[t - k : t])]
            if not after:
                break
            length = k
            total, distinct = sum(after.values()), len(after)
            probability = [
                (after[v] + distinct * probability[v]) / (total + distinct)
                for v in range(vocab_size)
            ]
        w = weights[length]
        given.append((w, probability))
        share = w * probability[tokens[t]] / ((1 - w) * p[t - 1] + w * probability[tokens[t]])
        scored[length] += 1
        weights[length] = w + (share - w) / (scored[length] + start_count)
        count(t)
    return given


def hints(tokens: Sequence[int]) -> list[int]:
    """The hint at each target: the candidate of its 15 tokens, where it followed them in four of
    five cases or more; else -1.

    A candidate that is no longer the majority gives way to the token that made it so, which begins
    with a count of 1.
    """
    followers: dict[tuple[int, ...], tuple[int, int, int]] = {}  # candidate, its count, all
    given = []
    for t in range(1, len(tokens)):
        context, token = tuple(tokens[t - 15 : t]), tokens[t]
        if t < 15:
            given.append(-1)
            continue
        candidate, count, total = followers.get(context, (token, 0, 0))
        given.append(candidate if total and count / total >= 0.8 else -1)
        total += 1
        if token == candidate:
            count += 1
        elif count <= total / 2:
            candidate, count = token, 1
        followers[context] = (candidate, count, total)
    return given
