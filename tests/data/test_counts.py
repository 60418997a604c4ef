"""The bytes of a prepared folder, by the challenge's count and by that of the source text."""

import json

import numpy as np
import pytest
import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.config import to_json
from sngpt_jax.config.families import quickstart
from sngpt_jax.config.file import read as read_config
from sngpt_jax.data.manifest import MANIFEST, load_manifest
from sngpt_jax.data.preparation import prepare
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.data.spec import PrepareSpec
from sngpt_jax.evaluation.bpb import Pass
from sngpt_jax.evaluation.report import describe
from sngpt_jax.evaluation.windows import standard_windows
from sngpt_jax.prepare import main

HALVES = "½" * 9  # three characters each where they are normalized
TEXTS = [
    f"{n}{HALVES[: n % 4 * 3]} cups of tea,\n\n  two\tspoons\r\nof sugar and a " + "biscuit " * n
    for n in range(30)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same text, prepared with each normalization."""
    root = tmp_path_factory.mktemp("counts")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (root / "text.jsonl").write_text("\n".join(lines))
    for rule in ("nmt_nfkc", "identity"):
        out = str(root / rule)
        given = {"val_docs": 3, "vocab_size": 300, "shard_tokens": 100, "normalization": rule}
        prepare(PrepareSpec(str(root / "text.jsonl"), out, **given))
    return root


def truth(folder, texts):
    """The counts of `texts`, from SentencePiece's own normalizer and decoder."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    kept = [sp.decode(sp.encode(text)) for text in texts]
    pairs = [(len(text.encode()), len(now.encode())) for text, now in zip(texts, kept, strict=True)]
    golf = sum(len(sp.normalize(text).replace("▁", " ").encode()) for text in texts)
    lossy = sum(text != now for text, now in zip(texts, kept, strict=True))
    return golf, sum(map(min, pairs)), sum(source for source, _ in pairs), lossy


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity"])
def test_the_manifest_keeps_every_count(folders, rule):
    manifest = load_manifest(folders / rule)
    for shards, texts in ((manifest.val, TEXTS[:3]), (manifest.train, TEXTS[3:])):
        names = ("golf_bytes", "text_bytes", "source_bytes", "lossy_documents")
        found = tuple(sum(getattr(shard, name) for shard in shards) for name in names)
        assert found == truth(folders / rule, texts)
        assert (found[0] == found[1] == found[2]) == (rule == "identity")


def test_whitespace_survives_by_default(tmp_path):
    text = "Enter KING.\n\n  KING:\tO,  speak!\r\n" * 300
    (tmp_path / "input.txt").write_text(text, newline="")
    prepare(PrepareSpec(str(tmp_path / "input.txt"), str(tmp_path / "out"), vocab_size=300))
    data = open_dataset(tmp_path / "out", 300)
    parts = [data.tokenizer.decode(x.take(1, len(x) - 1)) for x in (data.train, data.val)]
    assert "".join(parts) == text


def test_prepare_says_what_is_lost_and_shows_an_example(folders, tmp_path, capsys):
    given = ["--source", str(folders / "text.jsonl"), "--val-docs", "3", "--vocab-size", "300"]
    assert main([*given, "--normalization", "nmt_nfkc", "--out", str(tmp_path / "folded")]) == 0
    _, text, source, lossy = truth(tmp_path / "folded", TEXTS[3:])
    assert lossy == 27
    about = f"27 of 27 documents are not kept exactly; {1 - text / source:.2%} of the text's bytes"
    said = capsys.readouterr()
    assert about in said.err
    assert r"such as: '3\xbd\xbd" in said.err and r"became '31\u204421\u20442" in said.err
    assert "27 documents are not kept exactly" in said.out
    assert main([*given, "--out", str(tmp_path / "exact")]) == 0
    assert "not kept" not in capsys.readouterr().out


def test_text_that_encodes_to_nothing_is_refused(folders, tmp_path):
    (tmp_path / "bell.jsonl").write_text(
        "".join(json.dumps({"text": "\x07" * n}) + "\n" for n in range(1, 9))
    )
    tokenizer = str(folders / "nmt_nfkc/tokenizer.model")
    spec = PrepareSpec(str(tmp_path / "bell.jsonl"), str(tmp_path / "out"), tokenizer, val_docs=3)
    with pytest.raises(UserError, match=r"the val documents of .*bell.jsonl encode to no text"):
        prepare(spec)


def scored(folder, byte_count):
    data = open_dataset(folder, 300)
    windows = standard_windows(len(data.val), 1, 0)  # every token
    which = data.val, data.tokenizer.token_bytes(), None, windows, 8, None, byte_count
    return Pass(None, None, *which).score_of(100.0)


def test_a_score_says_its_count_and_knows_the_other(folders):
    text, golf = (scored(folders / "nmt_nfkc", name) for name in ("text", "golf"))
    assert (text.byte_count, golf.byte_count) == ("text", "golf")
    assert text.bytes == text.text_bytes == golf.text_bytes != golf.bytes == text.golf_bytes
    assert text.bpb_by("golf") == pytest.approx(golf.bpb, rel=1e-15)
    assert text.bpb * text.bytes == pytest.approx(100 / np.log(2), rel=1e-15)


def test_a_folder_of_format_1_has_the_challenges_count_alone(folders, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for path in (folders / "identity").iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((old / MANIFEST).read_text())
    manifest["format"] = 1
    for shard in manifest["train"] + manifest["val"]:
        shard["bytes"] = shard.pop("golf_bytes")
        assert shard["extra"] is None  # identity keeps every byte
        for name in ("text_bytes", "source_bytes", "lossy_documents"):
            del shard[name]
    del manifest["separation"]
    (old / MANIFEST).write_text(json.dumps(manifest))
    score = scored(old, "text")
    assert (score.byte_count, score.text_bytes) == ("golf", None)
    assert score.bytes == scored(folders / "identity", "text").bytes


RESULT = {"loss": 1.0, "bpb": 0.5, "tokens": 7, "windows": 1, "seconds": 1.0, "mode": "standard"}
RESULT |= {"perplexity": 2.7, "byte_count": "text", "data": {"name": "notes", "hash": "0123"}}


@pytest.mark.parametrize(("golf", "shown"), [(1000, False), (1001, False), (1002, True)])
def test_both_scores_are_printed_if_the_counts_differ(golf, shown):
    counts = {"bytes": 1000, "text_bytes": 1000, "golf_bytes": golf, "golf_bpb": 0.25}
    rows = dict(describe(RESULT | counts | {"lossy_documents": 2, "lost": 0.015}))
    assert "0.5000 bits/byte (text)" in rows["score"]
    assert rows.get("by golf") == (f"0.2500 bits/byte ({golf:,} bytes)" if shown else None)
    assert rows["lossy"].endswith("1.50% of the source's bytes are lost")


def test_a_configuration_of_an_earlier_version_counts_as_it_did(tmp_path):
    values = json.loads(to_json(quickstart(model={"num_kv_heads": 1})))
    assert values["eval"].pop("byte_count") == "text"
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path / "config.json").eval.byte_count == "golf"
