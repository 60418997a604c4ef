"""N-gram caches: what has been scored of a stream helps to predict what comes next.

One pass from left to right over the whole stream. The targets are the stream's tokens from the
second on; a cache is given the model's readings of the next ones, scores them, and only then
counts them. The modes:

    hashed5   5-grams in hashed tables, mixed by 0.2 into the target's probability          (hashed.py)
    backoff   the same for orders 7 to 2, mixed by a weight that grows with the entropy     (hashed.py)
    exact     collision-free counts of orders 1 to 7, Witten-Bell, with a learned weight    (exact.py)
    tilt      a hint from what mostly followed the last 15 tokens, lifted by e^β            (tilt.py)

The first two are not probability distributions: a bucket holds the counts of all n-grams that fall
into it, and every token of the vocabulary inherits them. `Cache.mass` measures it: the sum over
the vocabulary of what the cache would have given.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.ngram.chunk import Chunk

Mode = Literal["hashed5", "backoff", "exact", "tilt"]


class Cache(Protocol):
    """A cache over one stream. `score` or `mass` is called once on each chunk, in order; how the
    stream is cut is all one.
    """

    # what the model must say while scoring, beside "nll"; `mass` also needs "mass"
    readings: tuple[str, ...]
    is_distribution: bool  # whether the scores are those of probabilities that sum to 1
    memory_bytes: int  # what the tables take at most
    about: str  # one line: what is counted, how, and in how much memory

    @property
    def hints(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Where the model must be asked for hints: the next targets, uint16 [n] → theirs, int32
        [n], -1 where there is none.

        Called on each chunk's targets before the model runs, once, in order.
        """
        ...

    def score(self, chunk: Chunk) -> np.ndarray:
        """-ln of the mixed probability of each target, float64 [n]; then counts the targets."""
        ...

    def mass(self, chunk: Chunk, at: np.ndarray) -> np.ndarray:
        """Σ of the mixed probabilities over the whole vocabulary, float64 [k], at the offsets `at`
        [k] in the chunk, ascending.

        With the state that the cache has there. The chunk is counted as `score` counts it.
        """
        ...


def make_cache(
    mode: Mode,
    *,
    first_token: int,
    vocab_size: int,
    targets: int,
    first_segment: int,
    segment: int,
    memory: int,
    undercount: bool = False,
) -> Cache:
    """A new cache for a stream of `first_token` and then `targets` targets.

    The hashed modes count a segment's targets once all of it is scored: the first `first_segment`
    targets, then `segment` at a time. `exact` counts after every target, in at most `memory`
    bytes. `undercount` has `backoff` count as published.

    Raises `UserError` where numba is missing, where `exact` finds `memory` too small to start
    with, and where the machine does not have what the tables take.
    """
    try:
        from sngpt_jax.evaluation.ngram.exact import ExactCache
        from sngpt_jax.evaluation.ngram.hashed import HashedCache
        from sngpt_jax.evaluation.ngram.tilt import TiltCache
    except ModuleNotFoundError as missing:
        if missing.name != "numba":
            raise
        install = cli.command("pip", "install", "numba")
        raise UserError(
            f"the n-gram cache {mode} needs the package numba; install it: {install}"
        ) from missing

    try:
        match mode:
            case "hashed5":
                return HashedCache.hashed5(first_token, vocab_size, first_segment, segment)
            case "backoff":
                return HashedCache.backoff(
                    first_token, vocab_size, first_segment, segment, undercount
                )
            case "exact":
                return ExactCache(first_token, vocab_size, targets, memory)
            case "tilt":
                return TiltCache(first_token, targets)
    except MemoryError as refused:
        raise UserError(
            f"no memory for the tables of the n-gram cache {mode}: {refused}; use a machine with"
            " more"
        ) from refused
