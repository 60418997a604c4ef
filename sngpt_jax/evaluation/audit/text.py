"""The bytes of prepared text, counted again, and the documents that both splits have."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sngpt_jax.data.overlap import common, document_hashes
from sngpt_jax.data.shards import Dataset, TokenStream
from sngpt_jax.data.tokenizer import Tokenizer
from sngpt_jax.evaluation.audit.check import Check, unmade, verdict
from sngpt_jax.evaluation.windows import OnProgress


def document_spans(tokens: np.ndarray, bos_id: int) -> Iterator[tuple[int, int]]:
    """The ranges (first, end) of each document's tokens [N] without BOS, where there are any."""
    starts = np.flatnonzero(tokens == bos_id) + 1
    for first, following in pairwise([*starts.tolist(), len(tokens) + 1]):
        if first < following - 1:
            yield first, following - 1


def judge_table(dataset: Dataset) -> Check:
    """Compares the validation shards' bytes in the manifest with the table and its corrections."""
    name = "bytes by table"
    if not (manifest := dataset.manifest):
        return unmade(name, f"{dataset.directory} has no manifest.json that states them")
    table = dataset.tokenizer.token_bytes()
    found = dataset.val.count_bytes(table, 1, len(dataset.val))
    stated = {
        "golf": sum(shard.golf_bytes for shard in manifest.val),
        "text": sum(shard.text_bytes or 0 for shard in manifest.val),
    }
    if any(shard.text_bytes is None for shard in manifest.val):
        del stated["text"]  # made by an earlier version
    counted = {kind: getattr(found, kind) for kind in stated}
    texts = [f"{kind} {counted[kind]:,}, stated {stated[kind]:,}" for kind in stated]
    return verdict(name, counted == stated, "; ".join(texts), counted=counted, stated=stated)


def judge_decoded(
    stream: TokenStream, tokenizer: Tokenizer, progress: OnProgress | None = None
) -> Check:
    """Decodes every document of the stream, and compares the bytes of its text with its count.

    The count of a document that its tokens keep exactly is that of the decoded text. The count of
    another document is at most that. If the stream does not know the text, the table may
    miss one space after BOS and after each unknown token.
    """
    table, tokens = tokenizer.token_bytes(), stream.take(0, len(stream))
    spans = list(document_spans(tokens, tokenizer.bos_id))
    if not spans:
        return unmade("bytes decoded", f"no document begins with the token {tokenizer.bos_id}, BOS")
    size = counted = wrong = lossy = 0
    for done, (first, end) in enumerate(spans, 1):
        spelling = tokens[first:end][~table.boundary[tokens[first:end]]]
        decoded = len(tokenizer.decode(spelling).encode())
        found = stream.count_bytes(table, first, end)
        count, slack = found.golf, 1 + end - first - len(spelling)
        if stream.text_known:
            count, slack = found.text, decoded if found.lossy else 0
        wrong += not 0 <= decoded - count <= slack
        size, counted, lossy = size + decoded, counted + count, lossy + found.lossy
        if progress:
            progress(done, len(spans))
    text = f"{size:,} of the decoded text, {counted:,} counted, in {len(spans):,} documents"
    if lossy:
        text += f"; {lossy:,} of them are not kept exactly"
    if wrong:
        text += f"; {wrong:,} of them are counted wrong"
    return verdict("bytes decoded", not wrong, text, decoded=size, counted=counted, wrong=wrong)


def judge_leak(val: Dataset, trained: Dataset) -> Check:
    """Whether documents of `val`'s validation split are in `trained`'s training split, by hashes
    of their tokens, which the shards give.
    """
    name = "leak"
    if val.tokenizer.sha256 != trained.tokenizer.sha256:
        return unmade(name, f"{trained.directory} has tokens of another tokenizer")
    bos = val.tokenizer.bos_id
    documents = document_hashes(val.val, bos)
    found = common(documents, document_hashes(trained.train, bos))
    text = f"{found:,} of {len(documents):,} validation documents are in the training text"
    return verdict(name, not found, text, documents=len(documents), in_training=found)
