"""A model's score over a validation stream, with and without an n-gram cache, as `evaluate` prints
it.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from jax.sharding import Mesh

from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import Config
from sngpt_jax.data.identity import DataName, validation_name
from sngpt_jax.data.shards import Dataset
from sngpt_jax.evaluation.bpb import Pass, Score
from sngpt_jax.evaluation.ngram import score as ngram_score
from sngpt_jax.evaluation.ngram.cache import Cache, in_bytes
from sngpt_jax.evaluation.options import StreamOptions
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import AnyWindows, rows_at_a_time, window_batches
from sngpt_jax.model.forward import Variables
from sngpt_jax.run.console import progress_reporter

LARGEST_LOSS = 700.0  # nats; the perplexity of a larger one is beyond float64
DIFFERING = 1e-3  # share by which the two counts differ before both scores are printed

logger = logging.getLogger("sngpt_jax")


def score(
    options: StreamOptions, config: Config, variables: Variables, dataset: Dataset, mesh: Mesh
) -> dict[str, Any]:
    """The score for the command's JSON. `seconds` exclude compilation and a cache's mass."""
    stream, most = dataset.val, config.eval.device_batch_tokens
    windows = options.windows(len(stream), config.data.seq_len)

    def new_cache() -> Cache:
        assert options.ngram != "none"
        return ngram_score.make_cache(
            options.ngram,
            first_token=int(stream.take(0, 1)[0]),
            vocab_size=config.model.vocab_size,
            windows=windows,
            memory=int(options.ngram_memory * 2**30),
            undercount=options.ngram_undercount,
        )

    readings: tuple[str, ...] = ("nll",)
    if cache := None if options.ngram == "none" else new_cache():
        readings = ngram_score.readings_for(cache)
        # of a chunk, a token takes 2 bytes, a reading and a hint 4 each
        kept = in_bytes(windows.targets * (2 + 4 * len(readings) + 4 * bool(cache.hints)))
        logger.info(
            f"n-gram cache {options.ngram}: {cache.about}; another {kept} keep the model's readings"
            " for the mass"
        )
        ngram_score.warm_up(cache)
    rows = rows_at_a_time(windows, most, mesh.devices.size)
    first = next(window_batches(stream, windows, rows)).arrays
    if cache and cache.hints:
        first["hints"] = first["targets"].astype("int32")
    eval_step = Fitted(make_eval_step(config.model, mesh, readings), mesh, "scoring")
    compiled = eval_step.compiled(variables, batch_placer(mesh)(first))
    token_bytes, progress = dataset.tokenizer.token_bytes(), progress_reporter("evaluate")
    which = stream, token_bytes, mesh, windows, most, progress, config.eval.byte_count
    scoring = Pass(variables, compiled, *which)
    start = time.perf_counter()
    cached = ngram_score.score_with_cache(scoring, cache) if cache else None
    found = cached.model if cached else scoring.score()
    seconds = time.perf_counter() - start
    result = figures(found, windows, options.mode, seconds)
    result["data"] = vars(validation_name(dataset))
    if cached:
        del cache  # frees its tables before the next cache takes as much
        fresh = new_cache()
        mass = ngram_score.mass(fresh, cached.chunks, progress_reporter("mass"))
        loss, bpb = cached.mixed.loss, cached.mixed.bpb
        result["ngram"] = {
            "cache": options.ngram,
            "loss": loss,
            "bpb": bpb,
            "byte_count": found.byte_count,
            "normalized_bpb": bpb + mass.mean_log * found.tokens / math.log(2) / found.bytes,
            "mass": mass._asdict(),
            "is_distribution": fresh.is_distribution,
            "memory_bytes": fresh.memory_bytes,
        }
    return result


def figures(found: Score, windows: AnyWindows, mode: str, seconds: float) -> dict[str, Any]:
    """What a result says of a score over `windows`."""
    return {
        **asdict(found),
        "text_bpb": found.bpb_by("text"),
        "golf_bpb": found.bpb_by("golf"),
        "perplexity": math.exp(found.loss) if found.loss < LARGEST_LOSS else None,
        "bytes_per_token": found.bytes / found.tokens,
        "mode": mode,
        "stride": windows.stride,
        "windows": windows.count,
        "seconds": seconds,
        "tok_per_s": found.tokens / seconds,
        "forward_tok_per_s": windows.num_rows * windows.seq_len / seconds,
    }


def describe(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of a result of `score` for a person."""
    which = f"{result['windows']:,} windows"
    if result["mode"] == "sliding":
        which += f", stride {result['stride']}"
    by = result["byte_count"]
    size = f"{result['tokens']:,} tokens = {result['bytes']:,} bytes ({by})"
    if "documents" in result:
        size += f" of {result['documents']:,} documents"
    loss = f"loss {result['loss']:.4f} nats/token"
    if result["perplexity"] is not None:
        loss += f" (perplexity {result['perplexity']:,.2f})"
    rows = [
        ("score", f"{loss}, {result['bpb']:.4f} bits/byte ({by})"),
        ("over", f"{size} in {which}; {result['seconds']:.1f} s"),
        ("data", str(DataName(**result["data"]))),
    ]
    counts = {name: result[f"{name}_bytes"] for name in ("text", "golf")}
    if counts["text"] is None:
        rows.append(("bytes", "the data hold the golf count alone, without the source text's"))
    elif abs(counts["golf"] - counts["text"]) > DIFFERING * counts["text"]:
        other = "golf" if by == "text" else "text"
        bpb = f"{bpb:.4f} bits/byte" if (bpb := result[f"{other}_bpb"]) else "no bits/byte"
        rows.append((f"by {other}", f"{bpb} ({counts[other]:,} bytes)"))
    if result["lossy_documents"]:
        documents = f"{result['lossy_documents']:,} documents are not kept exactly"
        rows.append(("lossy", f"{documents}; {result['lost']:.2%} of the source's bytes are lost"))
    if cached := result.get("ngram"):
        verdict = "" if cached["is_distribution"] else ": not a probability distribution"
        text = (
            "loss {loss:.4f} nats/token, {bpb:.4f} bits/byte ({byte_count}); mass of the vocabulary"
            " {mass[mean]:.6g}, from {mass[min]:.6g} to {mass[max]:.6g}, at {mass[positions]:,}"
            " positions{verdict}; {normalized_bpb:.4f} bits/byte if divided by it"
        )
        rows.append((f"with {cached['cache']}", text.format(**cached, verdict=verdict)))
    return rows
