"""A stream scored by a model with an n-gram cache, and the total probability that the cache gives.

A score is a code length only if the probabilities behind it sum to 1 over the vocabulary.
"""

from typing import NamedTuple

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.bpb import Pass, Score, add_in_order
from sngpt_jax.evaluation.ngram.cache import Cache, Chunk, Mode
from sngpt_jax.evaluation.windows import OnProgress, Windows

PROBES = 10_000  # positions at which the mass is measured


class Mass(NamedTuple):
    """The sum of the mixed probabilities over the vocabulary, at evenly spaced positions."""

    mean: float
    min: float
    max: float
    mean_log: float  # the nats per token that dividing by the mass adds to the loss
    positions: int


class CachedScore(NamedTuple):
    """A stream's score by a model and by the model with a cache."""

    model: Score
    mixed: Score
    chunks: list[Chunk]  # the cache's input, for `mass`


def make_cache(
    mode: Mode,
    *,
    first_token: int,
    vocab_size: int,
    windows: Windows,
    memory: int,
    undercount: bool = False,
) -> Cache:
    """A new cache for a stream of `first_token` and then the targets of `windows`.

    The hashed modes count the targets of a window once all of them are scored. `exact` counts after
    every target, in at most `memory` bytes. `undercount` makes `backoff` count as published. Raises
    `UserError` if numba is missing, or if `memory` is too small for `exact`.
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

    if mode == "exact":
        return ExactCache(first_token, vocab_size, windows.targets, memory)
    if mode == "tilt":
        return TiltCache(first_token, windows.targets)
    segments = windows.seq_len, windows.stride
    return HashedCache(first_token, vocab_size, *segments, mode == "backoff", undercount)


def readings_for(cache: Cache) -> tuple[str, ...]:
    """The readings of `loss.token_readings` that `score_with_cache` and `mass` need."""
    return "nll", "mass", *cache.readings


def warm_up(cache: Cache) -> None:
    """Compiles the loops of `cache`, with a chunk of no targets."""
    targets = np.zeros(0, np.uint16)
    if cache.hints:
        cache.hints(targets)
    cache.score(Chunk(targets, targets.astype(np.float32)))


def score_with_cache(scoring: Pass, cache: Cache) -> CachedScore:
    """The scores of a pass, whose `eval_step` gives `readings_for(cache)`, with a new `cache`. The
    windows have no published tail, because a cache counts each target once.
    """
    by_model = mixed = 0.0
    chunks: list[Chunk] = []
    for found in scoring.readings(cache.hints):
        chunk = Chunk(**found)
        by_model = add_in_order(by_model, chunk.nll)
        mixed = add_in_order(mixed, cache.score(chunk))
        chunks.append(chunk)
    return CachedScore(scoring.score_of(by_model), scoring.score_of(mixed), chunks)


def mass(cache: Cache, chunks: list[Chunk], progress: OnProgress | None = None) -> Mass:
    """Repeats the pass with a new `cache`."""
    ends = np.cumsum([len(chunk.targets) for chunk in chunks]).tolist()
    count = min(PROBES, ends[-1])
    positions = np.arange(count) * ends[-1] // count
    found: list[np.ndarray] = []
    for chunk, end in zip(chunks, ends, strict=True):
        at = positions - (end - len(chunk.targets))
        found.append(cache.mass(chunk, at[(at >= 0) & (at < len(chunk.targets))]))
        if progress:
            progress(end, ends[-1])
    values = np.concatenate(found)
    mean, least, most = float(values.mean()), float(values.min()), float(values.max())
    return Mass(mean, least, most, float(np.log(values).mean()), count)
