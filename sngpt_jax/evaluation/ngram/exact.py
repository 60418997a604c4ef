"""Exact n-gram counts of the scored tokens, mixed into the model's probabilities. The result is a
probability distribution.

The n-grams of orders 1 to 7 form a trie in one open-addressed table. A node's key is its parent's
slot and its last token, so no two n-grams share a count. Let c(s, v) be the count of v after the
context s, C(s) the sum over v, N(s) the number of different v, and s' the context s without its
oldest token. Witten-Bell interpolates, with 1/V below the empty context:

    p_s(v) = (c(s, v) + N(s) p_{s'}(v)) / (C(s) + N(s))

(Witten and Bell 1991; Chen and Goodman 1998, section 2.6.) The target's probability becomes
(1 - w) p + w p_s, where s is the longest context that was ever continued. Each length of s has its
own w, learned online by the EM step of a mixture. Every target is counted once it is scored.
"""

import math
from typing import NamedTuple

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.ngram.cache import Chunk, in_bytes
from sngpt_jax.evaluation.ngram.compiled import compiled, scrambled

ORDER = 7
START_WEIGHT = 0.05
START_COUNT = 100  # the first weight counts as much as this many targets

# An n-gram: its parent's slot, its last token, how many different stored n-grams continued it, how
# often it came, and how often it was continued.
NODE = np.dtype(
    [("parent", "u4"), ("token", "u2"), ("distinct", "u2"), ("count", "u4"), ("total", "u4")]
)
MOST_DISTINCT = 2**16 - 1  # N(s) stops there; p_s sums to 1 with any N
MOST_SLOTS = 2**32 - 1
LEAST_SLOTS = 1024


class _Trie(NamedTuple):
    """The state that the compiled loops change."""

    nodes: np.ndarray  # NODE [slots + 1]; the last slot is the root, the empty context
    contexts: np.ndarray  # int64 [7], slots of the last 0 … 6 tokens; -1: not stored
    children: np.ndarray  # int64 [7], slots of `_probability`'s token after each context
    room: np.ndarray  # int64 [1], n-grams that can still be stored
    weights: np.ndarray  # float64 [7], w by the length of the context
    scored: np.ndarray  # int64 [7], targets that each w has mixed
    vocab_size: int


class ExactCache:
    """Counts over a stream of `targets` targets after `first_token`, in at most `memory` bytes.

    A third of the slots stay empty, so that searches are short. A full table stores no new
    n-grams. Those do not enter their contexts' totals, so p_s stays a distribution.
    """

    readings: tuple[str, ...] = ()
    hints = None
    is_distribution = True

    def __init__(self, first_token: int, vocab_size: int, targets: int, memory: int):
        most = sum(min(vocab_size**n, targets + 1) for n in range(1, ORDER + 1))
        slots = min(most + most // 2 + 1, memory // NODE.itemsize - 1, MOST_SLOTS)
        if slots < min(LEAST_SLOTS, most):
            least = (LEAST_SLOTS + 1) * NODE.itemsize
            gib = math.ceil(1e6 * least / 2**30) / 1e6
            raise UserError(
                f"{in_bytes(memory)} are too little memory for the n-gram cache exact; give it"
                f" {in_bytes(least)} or more (--ngram-memory {gib}, in GiB)"
            )
        limit = min(2 * slots // 3, most)
        self._trie = _Trie(
            nodes=np.zeros(slots + 1, NODE),
            contexts=np.array([slots] + [-1] * (ORDER - 1)),
            children=np.zeros(ORDER, np.int64),
            room=np.array([limit]),
            weights=np.full(ORDER, START_WEIGHT),
            scored=np.zeros(ORDER, np.int64),
            vocab_size=vocab_size,
        )
        # makes the machine find the memory now, not while targets are scored
        self._trie.nodes.fill(0)
        self.memory_bytes = self._trie.nodes.nbytes
        room = "every n-gram" if limit == most else f"{limit:,} n-grams; later ones are not counted"
        self.about = (
            f"exact counts of 1- to {ORDER}-grams; {in_bytes(self.memory_bytes)}, room for {room}"
        )
        _count(self._trie, 0, first_token)

    def score(self, chunk: Chunk) -> np.ndarray:
        return self._advance(chunk, np.empty(0, np.int64))[0]

    def mass(self, chunk: Chunk, at: np.ndarray) -> np.ndarray:
        _, weights, sums, _ = self._advance(chunk, at)
        return (1 - weights) * chunk.mass[at] + weights * sums

    def _advance(
        self, chunk: Chunk, at: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        p = np.exp(-chunk.nll.astype(np.float64))
        return _score_and_count(self._trie, chunk.targets.astype(np.uint16), p, at)


@compiled
def _home(nodes: np.ndarray, parent: int, token: int) -> int:
    """The slot where the search begins."""
    h = scrambled((np.uint64(parent) << np.uint64(16)) | np.uint64(token)) >> np.uint64(32)
    return int(np.int64((h * np.uint64(len(nodes) - 1)) >> np.uint64(32)))


@compiled
def _find(nodes: np.ndarray, parent: int, token: int) -> int:
    """The slot of an n-gram, or the empty slot where it would be stored."""
    slot = _home(nodes, parent, token)
    while nodes[slot].count and (nodes[slot].parent != parent or nodes[slot].token != token):
        slot += 1
        if slot == len(nodes) - 1:
            slot = 0
    return slot


@compiled
def _touch(trie: _Trie, token: int) -> int:
    """Reads where all searches for `token` begin, so that they wait for memory once."""
    total = 0
    for context in trie.contexts:
        total += trie.nodes[_home(trie.nodes, max(context, 0), token)].count
    return total


@compiled
def _probability(trie: _Trie, token: int) -> tuple[float, int]:
    """p_s(token), and the number of contexts that it has followed, whose `children` it sets."""
    # a token that followed a context also followed every shorter one
    p, known, searching = 1 / trie.vocab_size, 0, True
    for k in range(ORDER):
        context = trie.contexts[k]
        if context < 0 or trie.nodes[context].total == 0:
            break
        total, distinct = trie.nodes[context].total, trie.nodes[context].distinct
        count = 0
        if searching:
            trie.children[k] = _find(trie.nodes, context, token)
            count = trie.nodes[trie.children[k]].count
            searching = count > 0
            known += searching
        p = (count + distinct * p) / (total + distinct)
    return p, known


@compiled
def _count(trie: _Trie, known: int, token: int) -> None:
    """Counts `token`, which has followed the first `known` contexts before, after every context,
    and advances the contexts by it.
    """
    nodes, contexts, room = trie.nodes, trie.contexts, trie.room
    parent = contexts[0]
    for k in range(ORDER):
        child = -1
        if k < known:
            child = trie.children[k]
            nodes[child].count += 1
        elif parent >= 0 and room[0] > 0:
            child = _find(nodes, parent, token)
            nodes[child].parent, nodes[child].token, nodes[child].count = parent, token, 1
            nodes[parent].distinct = min(nodes[parent].distinct + 1, MOST_DISTINCT)
            room[0] -= 1
        if child >= 0:
            nodes[parent].total += 1
        if k + 1 < ORDER:
            parent = contexts[k + 1]
            contexts[k + 1] = child


@compiled
def _score_and_count(
    trie: _Trie, targets: np.ndarray, p: np.ndarray, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """-ln of the mixture [n], at `at` [k] the weights and the sums of p_s over the vocabulary, and
    what `_touch` read, which the compiler would otherwise omit.
    """
    nll, weights_at, sums = np.empty(len(targets)), np.empty(len(at)), np.zeros(len(at))
    asked = touched = 0
    for i in range(len(targets)):
        touched += _touch(trie, targets[i])
        length = ORDER - 1  # of the longest context that was ever continued
        while length and (
            trie.contexts[length] < 0 or trie.nodes[trie.contexts[length]].total == 0
        ):
            length -= 1
        w = trie.weights[length]
        if asked < len(at) and at[asked] == i:
            weights_at[asked] = w
            for v in range(trie.vocab_size):
                sums[asked] += _probability(trie, v)[0]
            asked += 1
        p_ng, known = _probability(trie, targets[i])
        mixed = (1 - w) * p[i] + w * p_ng
        nll[i] = -np.log(mixed)
        trie.scored[length] += 1
        trie.weights[length] += (w * p_ng / mixed - w) / (trie.scored[length] + START_COUNT)
        _count(trie, known, targets[i])
    return nll, weights_at, sums, touched
