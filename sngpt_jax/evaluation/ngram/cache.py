"""N-gram caches: the scored tokens of a stream help to predict the next token.

A cache makes one pass from left to right over the whole stream. The targets are the stream's tokens
from the second on. The cache takes the model's readings of the next targets, scores these targets,
and only then counts them.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.ngram.chunk import Chunk

Mode = Literal["hashed5", "backoff", "exact", "tilt"]


class Cache(Protocol):
    """A cache over one stream. Call `score` or `mass` once on each chunk, in order. Results do not
    depend on chunk boundaries.
    """

    # readings that the model must give for scoring, beside "nll"; `mass` also needs "mass"
    readings: tuple[str, ...]
    is_distribution: bool  # whether the mixed probabilities sum to 1
    memory_bytes: int  # most memory that the tables take
    about: str  # one line: which n-grams are counted, how, and in how much memory

    @property
    def hints(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """For a cache whose hints the model must score: the next targets, uint16 [n] → their hints,
        int32 [n], -1 for none.

        Call it once on each chunk's targets, in order, before the model runs.
        """
        ...

    def score(self, chunk: Chunk) -> np.ndarray:
        """-ln of the mixed probability of each target, float64 [n]; then counts the targets."""
        ...

    def mass(self, chunk: Chunk, at: np.ndarray) -> np.ndarray:
        """Σ of the mixed probabilities over the whole vocabulary, float64 [k], at the ascending
        offsets `at` [k] in the chunk, with the cache's state there.

        Counts the chunk as `score` does.
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
    bytes. `undercount` makes `backoff` count as published.

    Raises `UserError` if numba is missing, or if `memory` is too small for `exact` to start.
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

    hashed = first_token, vocab_size, first_segment, segment
    match mode:
        case "hashed5":
            return HashedCache((5,), *hashed, by_entropy=False)
        case "backoff":
            return HashedCache(range(7, 1, -1), *hashed, by_entropy=True, undercount=undercount)
        case "exact":
            return ExactCache(first_token, vocab_size, targets, memory)
        case "tilt":
            return TiltCache(first_token, targets)
