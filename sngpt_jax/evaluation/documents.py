"""The score of any text, document by document, each from its own BOS."""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import batch_placer
from sngpt_jax.config import Config
from sngpt_jax.data.corpus import Reading, as_path, named_documents
from sngpt_jax.data.identity import DataName, name_of
from sngpt_jax.data.manifest import MANIFEST, DataError, load_manifest
from sngpt_jax.data.overlap import HASH, document_hash, document_hashes, refuse_trained_text
from sngpt_jax.data.shards import TOKEN, Shard, TokenStream, moved
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.evaluation.bpb import Pass, add_in_order
from sngpt_jax.evaluation.options import StreamOptions
from sngpt_jax.evaluation.report import figures
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import document_windows, rows_at_a_time, window_batches
from sngpt_jax.model.forward import Variables
from sngpt_jax.run.console import progress_reporter


class Scored(NamedTuple):
    """A document to score."""

    name: str  # its file below the source
    number: int  # in this file, from 1
    tokens: int  # with BOS


@dataclass(frozen=True)
class Text:
    """Documents as tokens, one after the other."""

    name: DataName
    documents: Sequence[Scored]
    stream: TokenStream
    tokenizer: Tokenizer
    heads: np.ndarray  # hashes of the documents' first characters, uint64 [n]; see `encode`

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each document with its BOS, int64 [D]."""
        return np.array([document.tokens for document in self.documents], np.int64)


def encode(source: str, reading: Reading, tokenizer: Tokenizer, cut: int) -> Text:
    """The documents of a file, a folder or (-) standard input as tokens. Raises `UserError`.

    `cut` is the number of characters that a training took of its only document (0: it had several).
    The first `cut` characters of each longer document are hashed, too.
    """
    progress, tokens, corrections, documents = progress_reporter("tokenize"), [], [], []
    filled, heads = 0, []
    with as_path(source) as path:
        for name, number, text in named_documents(path, reading=reading):
            document = tokenizer.encode_document(text)
            tokens.append(document.tokens)
            corrections.append(moved(document.corrections, filled))
            count = len(document.tokens)
            name = source if source == "-" else name
            documents.append(Scored(name, number, count))
            filled += count
            if cut and len(text) > cut:
                heads.append(document_hash(tokenizer.encode_document(text[:cut]).tokens[1:]))
            progress(len(documents), 0, f"{filled:,} tokens")
    if not documents:
        raise UserError(f"--text {source}: no document; give text")
    whole = np.concatenate(tokens)
    shard = Shard(Path(source), whole, np.concatenate(corrections))
    digest = sha256(np.ascontiguousarray(whole, TOKEN).data).hexdigest()
    title = name_of(source if source == "-" else Path(source).absolute().name, [digest])
    stream = TokenStream((shard,), tokenizer.vocab_size)
    return Text(title, documents, stream, tokenizer, np.array(heads, HASH))


def encode_untrained(source: str, reading: Reading, tokenizer: Tokenizer, trained_in: Path) -> Text:
    """`encode` for a model that was trained on the folder `trained_in`. Raises `UserError` with the
    number of documents if it was trained on some, or on the first part of a document.
    """
    text = encode(source, reading, tokenizer, _cut(trained_in))
    given = trained_in, tokenizer.sha256
    refuse_trained_text(document_hashes(text.stream, tokenizer.bos_id), source, *given)
    if len(text.heads):
        refuse_trained_text(text.heads, f"{source}, cut like the training text", *given)
    return text


def _cut(trained_in: Path) -> int:
    """The characters of the only document of a folder's source that are its training text, or 0."""
    try:
        manifest = load_manifest(trained_in) if (trained_in / MANIFEST).is_file() else None
    except DataError:  # the comparison says so
        return 0
    return manifest.separation.cut if manifest and manifest.separation else 0


def score(
    options: StreamOptions, config: Config, variables: Variables, text: Text, mesh: Mesh
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The score of all documents together, as `report.score` gives it, and of each document."""
    most, lengths = config.eval.device_batch_tokens, text.tokens
    starts, targets = np.cumsum(lengths) - lengths, lengths - 1
    stride = options.stride_within(config.data.seq_len)
    windows = document_windows(starts, targets, config.data.seq_len, stride)
    if not windows.num_rows:
        raise UserError(f"--text {text.name.name}: its documents have no tokens; give text")
    step = Fitted(make_eval_step(config.model, mesh), mesh, "scoring")
    rows = rows_at_a_time(windows, most, mesh.devices.size)
    first = next(window_batches(text.stream, windows, rows)).arrays
    compiled = step.compiled(variables, batch_placer(mesh)(first))
    table, progress = text.tokenizer.token_bytes(), progress_reporter("evaluate")
    by = config.eval.byte_count
    scoring = Pass(variables, compiled, text.stream, table, mesh, windows, most, progress, by)
    start = time.perf_counter()
    nll = np.concatenate([found["nll"] for found in scoring.readings()])
    seconds = time.perf_counter() - start
    found = scoring.score_of(add_in_order(0.0, nll))
    own = []
    parts = np.split(nll, np.cumsum(targets)[:-1])
    for index, (document, part) in enumerate(zip(text.documents, parts, strict=True)):
        nats, only = add_in_order(0.0, part), slice(index, index + 1)
        alone = document_windows(starts[only], targets[only], config.data.seq_len, stride)
        size, bpb = 0, None
        if len(part):
            with contextlib.suppress(UserError):  # its tokens stand for no text
                its = replace(scoring, windows=alone).score_of(nats)
                size, bpb = its.bytes, its.bpb
        about = {"index": index, "name": document.name, "number": document.number}
        own.append(about | {"tokens": len(part), "bytes": size, "nats": nats, "bpb": bpb})
    result = figures(found, windows, options.mode, seconds)
    return result | {"documents": len(own), "data": vars(text.name)}, own


def as_lines(documents: Sequence[dict[str, Any]]) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(document, allow_nan=False) + "\n" for document in documents)
