"""A piece of a scored stream, as the model hands it to a cache."""

from typing import NamedTuple

import numpy as np


def in_bytes(number: int) -> str:
    """`1.5 GiB`, `32.0 MiB`, `16.0 KiB`, `1,000 bytes`, for a person."""
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**exponent:
            return f"{number / 2**exponent:,.1f} {unit}"
    return f"{number:,} bytes"


class Chunk(NamedTuple):
    """The model's readings of n consecutive targets; all arrays are [n]. `None`: not read."""

    targets: np.ndarray  # uint16, the tokens
    nll: np.ndarray  # float32, -ln p(target)
    entropy: np.ndarray | None = None  # float32, of p in nats
    mass: np.ndarray | None = None  # float32, Σ p over the vocabulary
    hints: np.ndarray | None = None  # int32, from the cache's `hints`; -1: none
    hint_nll: np.ndarray | None = None  # float32, -ln p(hint); arbitrary without a hint
