"""The writer of shards against plain concatenation, stopped and resumed anywhere."""

import contextlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.data.manifest import SplitJournal
from sngpt_jax.data.shards import open_extra, open_shard
from sngpt_jax.data.tokenizer import counted
from sngpt_jax.data.writer import SplitWriter
from tests.data.conftest import BytesOfPair


class Killed(Exception):
    pass


@settings(max_examples=40)
@given(st.data())
def test_writer_goes_on_exactly_after_any_number_of_stops(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=7), label="lengths")
    shard_tokens = data.draw(st.integers(1, 9), label="shard tokens")
    limit = data.draw(st.none() | st.integers(1, sum(lengths) + 3), label="limit")
    stops = data.draw(st.sets(st.integers(0, sum(lengths))), label="shards that end it")
    rng = np.random.default_rng(len(lengths))
    documents = [
        counted(
            BytesOfPair(),
            rng.integers(0, 999, n).astype(np.uint16),
            np.array([[n - 1, n, 2 * n, 3 * n, 1]], np.int64)[: n % 2],
        )
        for n in lengths
    ]
    folder = tmp_path_factory.mktemp("writer")
    progress, stops = SplitJournal(), sorted(stops)

    def on_shard(reached):
        nonlocal progress
        progress = reached
        if stops and len(reached.shards) >= stops[0]:
            stops.pop(0)
            raise Killed

    while not progress.finished:
        with contextlib.suppress(Killed):
            which = (folder, "train", shard_tokens, BytesOfPair(), progress)
            writer = SplitWriter(*which, on_shard, limit)
            for document in documents[progress.documents :]:
                writer.append(document)
            writer.finish()

    total = sum(lengths) if limit is None else min(limit, sum(lengths))
    whole = np.concatenate([document.tokens for document in documents])
    starts = np.cumsum([0, *lengths])
    cuts = range(0, total, shard_tokens)
    assert [e.tokens for e in progress.shards] == [min(shard_tokens, total - at) for at in cuts]
    shards = [open_shard(folder / e.name) for e in progress.shards]
    np.testing.assert_array_equal(np.concatenate(shards), whole[:total])
    begun = starts[:-1][starts[:-1] < total]
    per_token = np.concatenate([whole[:1], whole[:-1]]).astype(np.int64) * 1000 + whole
    rows = [
        (start + row, counts)
        for start, document in zip(starts, documents, strict=False)
        for row, *counts in document.corrections.tolist()
    ]
    for at, entry in zip(cuts, progress.shards, strict=True):
        end = min(at + shard_tokens, total)
        here = [[position - at, *counts] for position, counts in rows if at <= position < end]
        name = entry.extra and folder / entry.extra.name
        assert (open_extra(name, entry.tokens, 5).tolist() if name else []) == here
        assert entry.documents == ((begun >= at) & (begun < end)).sum()
        found = entry.golf_bytes, entry.text_bytes, entry.source_bytes, entry.lossy_documents
        more = np.array([[0] * 5, *here])[:, 1:].sum(axis=0)
        assert found == tuple(per_token[at:end].sum() * np.array([1, 1, 1, 0]) + more)
