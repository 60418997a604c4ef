"""What an n-gram cache is: it makes one pass from left to right over the targets of a stream, the
tokens from the second on. It takes the model's readings of the next targets, scores these targets,
and only then counts them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import numpy as np

Mode = Literal["hashed5", "backoff", "exact", "tilt"]


def in_bytes(number: int) -> str:
    """`1.5 GiB`, `32.0 MiB`, `16.0 KiB`, `1,000 bytes`, for a person."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**exponent:
            return f"{number / 2**exponent:,.1f} {unit}"
    return f"{number:,} bytes"


_UNREAD = np.zeros(0, np.float32)


class Chunk(NamedTuple):
    """The model's readings of n consecutive targets, all [n], float32 but for the tokens."""

    targets: np.ndarray  # uint16
    nll: np.ndarray  # -ln p(target)
    entropy: np.ndarray = _UNREAD  # of p in nats
    mass: np.ndarray = _UNREAD  # Σ p over the vocabulary
    hints: np.ndarray = _UNREAD  # int32, from the cache's `hints`; -1: none
    hint_nll: np.ndarray = _UNREAD  # -ln p(hint); arbitrary without a hint


class Cache(Protocol):
    """Call `score` or `mass` once on each chunk, in order. Results do not depend on chunk
    boundaries.
    """

    # readings that the model must give for scoring, beside "nll"; `mass` also needs "mass"
    readings: tuple[str, ...]
    is_distribution: bool  # whether the mixed probabilities sum to 1
    memory_bytes: int  # most memory that the tables take
    about: str  # one line for a person

    @property
    def hints(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """For a cache whose hints the model must score: the next targets, uint16 [n] → their hints,
        int32 [n], -1 for none. Call it on each chunk's targets before the model runs.
        """
        ...

    def score(self, chunk: Chunk) -> np.ndarray:
        """-ln of the mixed probability of each target, float64 [n]; then counts the targets."""
        ...

    def mass(self, chunk: Chunk, at: np.ndarray) -> np.ndarray:
        """Σ of the mixed probabilities over the whole vocabulary, float64 [k], at the ascending
        offsets `at` [k] in the chunk, with the cache's state there. Counts as `score` does.
        """
        ...
