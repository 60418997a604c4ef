"""A stream scored by a model with an n-gram cache, and the total probability that the cache gives.

A score is a code length only if the probabilities behind it sum to 1 over the vocabulary. `mass`
repeats the pass with a new cache and measures the sum at evenly spaced positions.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sngpt_jax.evaluation.bpb import Pass, Score, Sum
from sngpt_jax.evaluation.ngram.cache import Cache
from sngpt_jax.evaluation.ngram.chunk import Chunk
from sngpt_jax.evaluation.windows import OnProgress

PROBES = 10_000  # positions at which the mass is measured


@dataclass(frozen=True)
class Mass:
    """The sum of the mixed probabilities over the vocabulary, at `positions` positions evenly
    spaced over the scored targets.
    """

    mean: float
    min: float
    max: float
    # mean ln of the mass: the nats per token that dividing by the mass adds to the loss
    mean_log: float
    positions: int


@dataclass(frozen=True)
class CachedScore:
    """A stream's score with a cache and without it."""

    model: Score  # without the cache
    score: Score
    chunks: list[Chunk]  # the cache's input, for `mass`


def memory_of_chunks(cache: Cache, targets: int) -> int:
    """Bytes of the chunks that a pass over `targets` targets keeps: tokens of 2 bytes, readings and
    hints of 4.
    """
    return targets * (2 + 4 * len(readings_for(cache)) + 4 * bool(cache.hints))


def readings_for(cache: Cache) -> tuple[str, ...]:
    """The readings of `loss.token_readings` that `score_with_cache` and `mass` need."""
    return tuple(dict.fromkeys(("nll", "mass", *cache.readings)))


def warm_up(cache: Cache) -> None:
    """Compiles the loops of `cache`, with a chunk of no targets."""
    none = np.zeros(0, np.float32)
    targets = none.astype(np.uint16)
    hints = cache.hints(targets) if cache.hints else None
    cache.score(Chunk(targets, none, none, none, hints, none))


def score_with_cache(scoring: Pass, cache: Cache) -> CachedScore:
    """The scores of a pass by the model and by the model with a new `cache`.

    `scoring.eval_step` gives `readings_for(cache)`. The windows have no published tail, because a
    cache counts each target once.
    """
    by_model, mixed = Sum(), Sum()
    chunks: list[Chunk] = []
    for found in scoring.readings(cache.hints):
        chunk = Chunk(**found)
        by_model.add(chunk.nll)
        mixed.add(cache.score(chunk))
        chunks.append(chunk)
    return CachedScore(scoring.score_of(by_model.total), scoring.score_of(mixed.total), chunks)


def mass(cache: Cache, chunks: list[Chunk], progress: OnProgress | None = None) -> Mass:
    """The mass of a new `cache` over the pass with `chunks`, at `PROBES` positions or all."""
    targets = sum(len(chunk.targets) for chunk in chunks)
    count = min(PROBES, targets)
    positions = np.arange(count) * targets // count
    found: list[np.ndarray] = []
    start = 0
    for chunk in chunks:
        stop = start + len(chunk.targets)
        at = positions[(start <= positions) & (positions < stop)] - start
        found.append(cache.mass(chunk, at))
        start = stop
        if progress:
            progress(stop, targets)
    values = np.concatenate(found)
    mean, least, most, mean_log = values.mean(), values.min(), values.max(), np.log(values).mean()
    return Mass(float(mean), float(least), float(most), float(mean_log), count)


def as_dict(score: Score, mass: Mass, cache: Cache) -> dict[str, Any]:
    """The cache's part of the command's JSON."""
    return {
        "loss": score.loss,
        "bpb": score.bpb,
        "normalized_bpb": score.bpb + mass.mean_log * score.tokens / math.log(2) / score.bytes,
        "mass": asdict(mass),
        "is_distribution": cache.is_distribution,
        "memory_bytes": cache.memory_bytes,
    }
