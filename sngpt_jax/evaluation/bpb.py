"""Loss and bits per byte over a validation stream, in standard windows.

The stream is cut into windows of T inputs from offset 0, and each window's T targets are scored with that window's
context alone; a last partial window is dropped. Bits per byte divide by the UTF-8 bytes of the scored text, so that
models with different tokenizers compare:

    bpb = (Σ nll / ln 2) / Σ bytes(target)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.cli import UserError
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset, TokenStream
from sngpt_jax.data.tokenizer import TokenBytes
from sngpt_jax.parallel import batch_placer
from sngpt_jax.step import Batch, Params, Variables, make_eval_step

EvalStep = Callable[[Params, Batch], jax.Array]


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token, `bpb` in bits a byte, over `tokens` targets that stand for `bytes` bytes of text."""

    loss: float
    bpb: float
    tokens: int
    bytes: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def standard_windows(num_tokens: int, seq_len: int, max_tokens: int) -> int:
    """How many standard windows a stream of `num_tokens` holds, at most `max_tokens` targets (0: no limit)."""
    if max_tokens and max_tokens < seq_len:
        raise UserError(f"{max_tokens} tokens to score are less than one window of data.seq_len = {seq_len} tokens")
    windows = (num_tokens - 1) // seq_len
    if windows < 1:
        raise UserError(
            f"the validation stream has {num_tokens} tokens; one window needs data.seq_len + 1 = {seq_len + 1}:"
            " hold out more documents (prepare --val-docs) or score shorter sequences"
        )
    return min(windows, max_tokens // seq_len) if max_tokens else windows


def rows_at_a_time(windows: int, seq_len: int, device_batch_tokens: int, num_devices: int) -> int:
    """How many windows all devices read at a time: as many as fit, no more than there are, a multiple of the devices."""
    return min(max(1, device_batch_tokens // seq_len), math.ceil(windows / num_devices)) * num_devices


def window_batches(stream: TokenStream, windows: int, seq_len: int, rows: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Batches of `rows` windows and how many of them count; the last one is filled up with its first window."""
    for first in range(0, windows, rows):
        count = min(rows, windows - first)
        tokens = stream.take(first * seq_len, count * seq_len + 1)
        inputs, targets = tokens[:-1].reshape(count, seq_len), tokens[1:].reshape(count, seq_len)
        if count < rows:
            filler = np.zeros(rows - count, np.int64)
            inputs, targets = (np.concatenate([a, a[filler]]) for a in (inputs, targets))
        yield {"inputs": inputs, "targets": targets}, count


def score_stream(
    params: Params,
    eval_step: EvalStep,
    stream: TokenStream,
    token_bytes: TokenBytes,
    mesh: Mesh,
    *,
    seq_len: int,
    device_batch_tokens: int,
    max_tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores `stream`; losses are summed over a row on the device in float32 and over rows on the host in float64.

    A batch is dispatched before the one before it is read, so that the device does not wait for the host.
    `progress(done, total)` is told of windows as they are read; what it raises ends the scoring.
    """
    windows = standard_windows(len(stream), seq_len, max_tokens)
    rows = rows_at_a_time(windows, seq_len, device_batch_tokens, mesh.devices.size)
    place = batch_placer(mesh)
    nll, done = 0.0, 0
    pending: tuple[jax.Array, int] | None = None

    def read(sums: jax.Array, count: int) -> None:
        nonlocal nll, done
        nll += float(np.sum(np.asarray(sums)[:count], dtype=np.float64))
        done += count
        if progress:
            progress(done, windows)

    for batch, count in window_batches(stream, windows, seq_len, rows):
        dispatched = eval_step(params, place(batch)), count
        if pending:
            read(*pending)
        pending = dispatched
    if pending:
        read(*pending)

    tokens = windows * seq_len
    total_bytes = stream.count_bytes(token_bytes, 1, tokens + 1)
    return Score(loss=nll / tokens, bpb=nll / math.log(2) / total_bytes, tokens=tokens, bytes=total_bytes)


def score_validation(
    config: Config,
    variables: Variables,
    dataset: Dataset,
    mesh: Mesh,
    max_tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """`score_stream` of a data set's validation tokens by a whole model, in windows as long as its training's."""
    return score_stream(
        variables,
        make_eval_step(config.model, mesh),
        dataset.val,
        dataset.tokenizer.token_bytes(),
        mesh,
        seq_len=config.data.seq_len,
        device_batch_tokens=config.eval.device_batch_tokens,
        max_tokens=max_tokens,
        progress=progress,
    )
