"""A hint from the tokens before the target, and the model's probabilities tilted toward it.

If the token h followed the last 15 tokens in at least four of five cases (parameter-golf's PRs
#1145 and #2135):

    p'(v) = p(v) e^{β [v = h]} / (1 + q (e^β - 1)),  q = p(h),  β = 2.625.

The hint is chosen before the target is known, so the p' of the whole vocabulary sum to 1.
"""

import math

import numpy as np

from sngpt_jax.evaluation.ngram.cache import Chunk, in_bytes
from sngpt_jax.evaluation.ngram.compiled import compiled, scrambled

CONTEXT = 15  # tokens that a hint follows from: order 16
BETA = 2.625
LEAST_BUCKETS = 16
PROBES = 16  # neighbouring buckets among which a context has its place

# A context: half of its hash, how often its candidate followed since it became one, how often any
# token followed, and the candidate. A candidate without a majority is replaced. A context is
# replaced when all places of a new context are taken.
FOLLOWER = np.dtype(
    [("context", "u4"), ("count", "u4"), ("total", "u4"), ("token", "u2")], align=True
)

BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial over a context's tokens, modulo 2^64
BASE_CONTEXT = np.uint64(pow(int(BASE), CONTEXT, 2**64))


class TiltCache:
    """The scores of the tilted probabilities. Only `hints` changes the state.

    There are at least 1.5 times as many buckets as targets.
    """

    readings: tuple[str, ...] = ("hint_nll",)
    is_distribution = True

    def __init__(self, first_token: int, targets: int):
        buckets = 1 << (max(LEAST_BUCKETS, targets + targets // 2) - 1).bit_length()
        self._table = np.zeros(buckets, FOLLOWER)
        self._recent = np.array([first_token], np.uint16)
        self.memory_bytes = self._table.nbytes
        self.about = (
            f"the token that mostly followed the last {CONTEXT} tokens is raised by e^{BETA};"
            f" {in_bytes(self.memory_bytes)}"
        )

    def hints(self, targets: np.ndarray) -> np.ndarray:
        """See `Cache.hints`."""
        before, tokens = len(self._recent), np.concatenate([self._recent, targets])
        self._recent = tokens[-CONTEXT:]
        return _hint_and_follow(tokens, before, self._table)

    def score(self, chunk: Chunk) -> np.ndarray:
        hinted, lift = self._hinted(chunk)
        nll = chunk.nll.astype(np.float64)
        return np.where(hinted, nll - BETA * (chunk.targets == chunk.hints) + np.log1p(lift), nll)

    def mass(self, chunk: Chunk, at: np.ndarray) -> np.ndarray:
        hinted, lift = (a[at] for a in self._hinted(chunk))
        own = chunk.mass[at].astype(np.float64)
        return np.where(hinted, (own + lift) / (1 + lift), own)

    def _hinted(self, chunk: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Where there is a hint, bool [n], and q (e^β - 1), which the hint adds to the sum of the
        p, float64 [n].
        """
        hinted = chunk.hints >= 0
        q = np.where(hinted, np.exp(-chunk.hint_nll.astype(np.float64)), 0.0)
        return hinted, q * math.expm1(BETA)


@compiled
def _hint_and_follow(tokens: np.ndarray, before: int, table: np.ndarray) -> np.ndarray:
    hints, mask = np.full(len(tokens) - before, -1, np.int32), np.uint64(len(table) - 1)
    h = np.uint64(0)
    for t in range(max(0, before - CONTEXT), len(tokens)):
        if t >= before and t >= CONTEXT:
            context = scrambled(h)
            check = np.uint32(context >> np.uint64(32))
            place = context & mask
            for step in range(PROBES):
                near = table[(context + np.uint64(step)) & mask]
                if near.total == 0 or near.context == check:
                    place = (context + np.uint64(step)) & mask
                    break
            bucket = table[place]
            if bucket.total == 0 or bucket.context != check:
                bucket.context, bucket.token = check, tokens[t]
                bucket.count = bucket.total = np.uint32(1)
            else:
                if 5 * bucket.count >= 4 * bucket.total:
                    hints[t - before] = bucket.token
                bucket.total += np.uint32(1)
                if bucket.token == tokens[t]:
                    bucket.count += np.uint32(1)
                elif 2 * bucket.count <= bucket.total:
                    bucket.token, bucket.count = tokens[t], np.uint32(1)
        h = h * BASE + np.uint64(tokens[t])
        if t >= CONTEXT:
            h -= np.uint64(tokens[t - CONTEXT]) * BASE_CONTEXT
    return hints
