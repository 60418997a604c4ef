"""Loss and bits per byte over a validation stream.

Bits per byte divide by the UTF-8 bytes of the scored text, so that models with different
tokenizers compare:

    bpb = (Σ nll / ln 2) / Σ bytes(target)

`evaluation.windows` says which context each target is scored with.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import Config
from sngpt_jax.data.shards import Dataset, TokenStream
from sngpt_jax.data.tokenizer import TokenBytes
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import (
    WindowBatch,
    Windows,
    rows_at_a_time,
    sliding_windows,
    standard_windows,
    window_batches,
)
from sngpt_jax.model.forward import Batch, Variables

EvalStep = Callable[[Variables, Batch], dict[str, jax.Array]]
Hints = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Score:
    """`loss` in nats a token, `bpb` in bits a byte, over `tokens` targets that stand for `bytes`
    bytes of text.
    """

    loss: float
    bpb: float
    tokens: int
    bytes: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


class Sum:
    """A sum in float64, one number after the other: the same however the numbers are cut into
    pieces.
    """

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, values: np.ndarray) -> None:
        """Adds the numbers [n], the first one first."""
        self.total = float(np.cumsum(np.concatenate([[self.total], values]), dtype=np.float64)[-1])


def token_scores(
    variables: Variables,
    eval_step: EvalStep,
    stream: TokenStream,
    mesh: Mesh,
    windows: Windows,
    *,
    device_batch_tokens: int,
    hints: Hints | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """What `eval_step` reads of the scored targets, [n] by name in their order, for one batch of
    windows after the other.

    "targets" are there too, and the "hints" that `hints(targets)` gives for them (-1: none). A
    batch is dispatched before the one before it is read, so that the device does not wait for the
    host. `progress(done, total)` is told of rows as they are read; what it raises ends the
    scoring.
    """
    rows = rows_at_a_time(windows, device_batch_tokens, mesh.devices.size)
    place = batch_placer(mesh)
    done = 0
    pending: tuple[dict[str, jax.Array], dict[str, np.ndarray], WindowBatch] | None = None

    def read(
        on_device: dict[str, jax.Array], on_host: dict[str, np.ndarray], batch: WindowBatch
    ) -> dict[str, np.ndarray]:
        nonlocal done
        found = {name: np.asarray(values)[batch.scored] for name, values in on_device.items()}
        done += batch.count
        if progress:
            progress(done, windows.num_rows)
        return found | on_host

    for batch in window_batches(stream, windows, rows):
        arrays, on_host = batch.arrays, {"targets": batch.arrays["targets"][batch.scored]}
        if hints:
            on_host["hints"] = hints(on_host["targets"])
            arrays["hints"] = np.zeros(arrays["targets"].shape, np.int32)
            arrays["hints"][batch.scored] = np.maximum(on_host["hints"], 0)
        dispatched = eval_step(variables, place(arrays)), on_host, batch
        if pending:
            yield read(*pending)
        pending = dispatched
    if pending:
        yield read(*pending)


def score_of(nll: float, stream: TokenStream, token_bytes: TokenBytes, windows: Windows) -> Score:
    """The score of the windows' targets whose losses are `nll` nats in all. Raises `UserError`
    where they are no text.
    """
    tokens = sum(stop - start for start, stop in windows.spans())
    total_bytes = sum(
        stream.count_bytes(token_bytes, start + 1, stop + 1) for start, stop in windows.spans()
    )
    if not total_bytes:
        raise UserError(
            f"the {tokens:,} scored tokens stand for no text, only for marks such as BOS; score"
            " other data"
        )
    return Score(
        loss=nll / tokens, bpb=nll / math.log(2) / total_bytes, tokens=tokens, bytes=total_bytes
    )


def score_stream(
    variables: Variables,
    eval_step: EvalStep,
    stream: TokenStream,
    token_bytes: TokenBytes,
    mesh: Mesh,
    windows: Windows,
    *,
    device_batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Scores `stream` in `windows`; the tokens' losses are float32, their sum float64."""
    nll = Sum()
    for found in token_scores(
        variables,
        eval_step,
        stream,
        mesh,
        windows,
        device_batch_tokens=device_batch_tokens,
        progress=progress,
    ):
        nll.add(found["nll"])
    return score_of(nll.total, stream, token_bytes, windows)


def score_validation(
    config: Config,
    variables: Variables,
    dataset: Dataset,
    mesh: Mesh,
    max_tokens: int = 0,
    progress: Callable[[int, int], None] | None = None,
    stride: int = 0,
) -> Score:
    """`score_stream` of a data set's validation tokens by a whole model, in windows as long as its
    training's.

    They are standard windows, or with a `stride` sliding ones.
    """
    num_tokens, seq_len = len(dataset.val), config.data.seq_len
    return score_stream(
        variables,
        make_eval_step(config.model, mesh),
        dataset.val,
        dataset.tokenizer.token_bytes(),
        mesh,
        (
            sliding_windows(num_tokens, seq_len, stride, max_tokens)
            if stride
            else standard_windows(num_tokens, seq_len, max_tokens)
        ),
        device_batch_tokens=config.eval.device_batch_tokens,
        progress=progress,
    )
