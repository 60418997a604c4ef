"""A stream scored by a model with an n-gram cache, and how much probability the cache hands out in
all.

A score is one of a code, or of a bet, only where the numbers it is made of sum to 1 over the
vocabulary. `mass` says what they sum to: it plays the same pass once more with a fresh cache and,
at evenly spaced positions, sums what the cache would have given each token of the vocabulary at
that moment.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sngpt_jax.data.shards import TokenStream
from sngpt_jax.data.tokenizer import TokenBytes
from sngpt_jax.evaluation.bpb import EvalStep, Score, Sum, score_of, token_scores
from sngpt_jax.evaluation.ngram.cache import Cache
from sngpt_jax.evaluation.ngram.chunk import Chunk
from sngpt_jax.evaluation.windows import Windows
from sngpt_jax.model.forward import Variables

PROBES = 10_000  # positions at which the mass is taken


@dataclass(frozen=True)
class Mass:
    """Of the mixed probability over the whole vocabulary, at `positions` positions evenly spaced
    over the scored targets.
    """

    mean: float
    min: float
    max: float
    # mean ln of the mass: about the nats a token that dividing every distribution by its mass
    # would cost
    mean_log: float
    positions: int


@dataclass(frozen=True)
class CachedScore:
    """A score with a cache, the same stream's without it, and what `mass` needs."""

    model: Score  # without the cache
    score: Score
    chunks: list[Chunk]  # what the cache was given, for `mass`


def memory_of_chunks(cache: Cache, targets: int) -> int:
    """Bytes of the chunks that a pass over so many targets keeps: tokens of 2 bytes, readings and
    hints of 4.
    """
    return targets * (2 + 4 * len(readings_for(cache)) + 4 * bool(cache.hints))


def readings_for(cache: Cache) -> tuple[str, ...]:
    """What a step must read for `score_with_cache`: of `loss.token_readings`, for scoring and for
    the mass.
    """
    return tuple(dict.fromkeys(("nll", "mass", *cache.readings)))


def warm_up(cache: Cache) -> None:
    """Compiles what `cache` runs, by a chunk of no targets."""
    none = np.zeros(0, np.float32)
    targets = none.astype(np.uint16)
    cache.score(
        Chunk(targets, none, none, none, cache.hints(targets) if cache.hints else None, none)
    )


def score_with_cache(
    variables: Variables,
    eval_step: EvalStep,
    stream: TokenStream,
    token_bytes: TokenBytes,
    mesh: Mesh,
    windows: Windows,
    cache: Cache,
    *,
    device_batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> CachedScore:
    """Scores `stream` as `score_stream` does, by the model and by the model with a new `cache`, in
    one pass.

    The cache is one, on the host, and sees the targets in their order however many devices there
    are; it works on a batch while the devices work on the next. `eval_step` gives
    `readings_for(cache)`.
    """
    if windows.tail == "published":
        raise ValueError("a published tail scores targets again; a cache counts each once")
    by_model, mixed = Sum(), Sum()
    chunks: list[Chunk] = []
    for found in token_scores(
        variables,
        eval_step,
        stream,
        mesh,
        windows,
        device_batch_tokens=device_batch_tokens,
        hints=cache.hints,
        progress=progress,
    ):
        chunk = Chunk(**found)
        by_model.add(chunk.nll)
        mixed.add(cache.score(chunk))
        chunks.append(chunk)
    model, score = (score_of(sum.total, stream, token_bytes, windows) for sum in (by_model, mixed))
    return CachedScore(model, score, chunks)


def mass(
    cache: Cache, chunks: list[Chunk], progress: Callable[[int, int], None] | None = None
) -> Mass:
    """What a new `cache` hands out in all over the pass that `chunks` are, at `PROBES` positions
    or as many as there are.
    """
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
    return Mass(
        float(values.mean()),
        float(values.min()),
        float(values.max()),
        float(np.log(values).mean()),
        count,
    )


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
