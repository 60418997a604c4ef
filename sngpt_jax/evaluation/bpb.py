"""Loss and bits per byte over a validation stream:

    bpb = (Σ nll / ln 2) / Σ bytes(target)

The bytes are UTF-8 bytes of the text, so models with different tokenizers compare. There are two
counts (`data.tokenizer.ByteCounts`): "text" and "golf".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import ByteCount, Config
from sngpt_jax.data.shards import Dataset, TokenStream
from sngpt_jax.data.tokenizer import TokenBytes
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import (
    AnyWindows,
    OnProgress,
    WindowBatch,
    read_windows,
    rows_at_a_time,
    sliding_windows,
    standard_windows,
)
from sngpt_jax.model.forward import Batch, Variables


@dataclass(frozen=True)
class Score:
    """A model's score over a stream."""

    loss: float  # nats per token
    bpb: float  # bits per byte
    tokens: int  # number of scored targets
    bytes: int  # of the text that they stand for, by `byte_count`
    byte_count: ByteCount
    text_bytes: int | None  # by each count; None if the data hold no such count
    golf_bytes: int
    lost: float | None  # share of the source's bytes that the tokens do not keep
    lossy_documents: int | None  # that end in the scored text and are not kept exactly

    def bpb_by(self, byte_count: ByteCount) -> float | None:
        """The bits per byte of one count; None if the data do not hold it."""
        size = self.text_bytes if byte_count == "text" else self.golf_bytes
        return self.bpb * self.bytes / size if size else None


def add_in_order(total: float, values: np.ndarray) -> float:
    """`total` plus the numbers [n] in float64, one after the other, so that sums do not depend on
    how the numbers are cut into pieces.
    """
    return float(np.cumsum(np.concatenate([[total], values]), dtype=np.float64)[-1])


@dataclass(frozen=True)
class Pass:
    """One pass of a model over a stream in windows. `progress` counts rows."""

    variables: Variables
    eval_step: Callable[[Variables, Batch], dict[str, jax.Array]]
    stream: TokenStream
    token_bytes: TokenBytes
    mesh: Mesh
    windows: AnyWindows
    device_batch_tokens: int
    progress: OnProgress | None = None
    byte_count: ByteCount = "text"

    def readings(
        self, hints: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The readings of `eval_step` for the scored targets of each batch, [n] by name in order,
        with "targets" and the "hints" of `hints(targets)` (-1: none).
        """
        place = batch_placer(self.mesh)
        rows = rows_at_a_time(self.windows, self.device_batch_tokens, self.mesh.devices.size)

        def dispatch(batch: WindowBatch) -> tuple[dict[str, jax.Array], dict[str, np.ndarray]]:
            arrays, on_host = batch.arrays, {"targets": batch.arrays["targets"][batch.scored]}
            if hints:
                on_host["hints"] = hints(on_host["targets"])
                arrays["hints"] = np.zeros(arrays["targets"].shape, np.int32)
                arrays["hints"][batch.scored] = np.maximum(on_host["hints"], 0)
            return self.eval_step(self.variables, place(arrays)), on_host

        batches = read_windows(self.stream, self.windows, rows, dispatch, self.progress)
        for (on_device, on_host), batch in batches:
            found = {name: np.asarray(values)[batch.scored] for name, values in on_device.items()}
            yield found | on_host

    def score_of(self, nll: float) -> Score:
        """The score of losses that sum to `nll`. Data without the text's count have the golf count
        alone. Raises `UserError` if there is no text.
        """
        spans = self.windows.spans()
        tokens = sum(stop - start for start, stop in spans)
        count, known = self.stream.count_bytes, self.stream.text_known
        counts = [count(self.token_bytes, first + 1, end + 1) for first, end in spans]
        golf, text, source, lossy = (sum(column) for column in zip(*counts, strict=True))
        by: ByteCount = self.byte_count if known else "golf"
        size = text if by == "text" else golf
        if not size:
            raise UserError(
                f"the {tokens:,} scored tokens stand for no text, only for marks such as BOS; score"
                " other data"
            )
        about_text = (text, golf, 1 - text / source if source else 0.0, lossy)
        if not known:
            about_text = (None, golf, None, None)
        return Score(nll / tokens, nll / math.log(2) / size, tokens, size, by, *about_text)

    def score(self) -> Score:
        nll = 0.0
        for found in self.readings():
            nll = add_in_order(nll, found["nll"])
        return self.score_of(nll)


def score_validation(
    config: Config,
    variables: Variables,
    dataset: Dataset,
    mesh: Mesh,
    max_tokens: int = 0,
    progress: OnProgress | None = None,
    stride: int = 0,
    eval_step: Callable[[Variables, Batch], dict[str, jax.Array]] | None = None,
) -> Score:
    """The score of the validation tokens, in sliding windows of `stride` or (0) standard ones.
    `eval_step` replaces that of `make_eval_step`.
    """
    size = len(dataset.val), config.data.seq_len
    windows = standard_windows(*size, max_tokens)
    if stride:
        windows = sliding_windows(*size, stride, max_tokens)
    step = eval_step or make_eval_step(config.model, mesh)
    token_bytes = dataset.tokenizer.token_bytes()
    most = config.eval.device_batch_tokens
    which = dataset.val, token_bytes, mesh, windows, most, progress, config.eval.byte_count
    return Pass(variables, step, *which).score()
