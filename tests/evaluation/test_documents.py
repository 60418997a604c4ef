"""Windows over documents, and the score of a text against a pass over each document alone."""

import io
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax import evaluate
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.data.corpus import USUAL
from sngpt_jax.data.preparation import PrepareSpec, prepare
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.evaluation import documents
from sngpt_jax.evaluation.windows import document_windows, sliding_windows
from sngpt_jax.model.forward import forward
from sngpt_jax.weights.source import load_model

T = 32  # of the tiny run


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 8), st.data())
def test_each_target_is_scored_once_with_its_own_document_before_it(lengths, T, data):
    """By a list of all (document, target, start): a long document as a stream of its own, a short
    one as one window.
    """
    S = data.draw(st.integers(1, T))
    lengths = np.array(lengths)
    starts = np.cumsum(lengths) - lengths
    windows = document_windows(starts, lengths - 1, T, S)
    found = []
    for start, begin, upto in zip(*windows.rows(0, windows.num_rows), strict=True):
        assert 0 <= begin < upto <= T and upto - begin <= S
        found += [(start, start + within) for within in range(begin, upto)]
    wanted, count = [], 0
    for first, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        if length - 1 <= T:
            count += length > 1
            wanted += [(first, first + target) for target in range(length - 1)]
            continue
        own = sliding_windows(length, T, S, 0)
        count += own.count
        for start, begin, upto in zip(*own.rows(0, own.num_rows), strict=True):
            wanted += [(first + start, first + start + within) for within in range(begin, upto)]
    assert found == wanted and windows.count == count
    spans = [
        first + target
        for a, b in windows.spans()
        for first, target in [(a, t - a) for t in range(a, b)]
    ]
    assert spans == [target for _, target in found]


# ------------------------------------------------------------------------------ the command

LONG = " ".join(["abc", "de", "fghij", "ja"] * 30)


@pytest.fixture
def folder(tmp_path):
    texts = {
        "a.txt": f"b\n<|endoftext|>\n<|endoftext|>\ncab dab\n<|endoftext|>\n{LONG}\n",
        "b/c.md": "dé 🦜",
    }
    (tmp_path / "text" / "b").mkdir(parents=True)
    for name, text in texts.items():
        (tmp_path / "text" / name).write_text(text)
    return tmp_path / "text"


WANTED = [
    ("a.txt", 1, "b\n"),
    ("a.txt", 3, "cab dab\n"),
    ("a.txt", 4, LONG + "\n"),
    ("b/c.md", 1, "dé 🦜"),
]


def nats(model, tokens, stride):
    """Σ nll of a document by float64 softmax over passes of windows of T, float."""
    apply, total, ids = jax.jit(forward(model.config.model)), 0.0, np.array(tokens, np.int32)
    for target in range(1, len(ids)):
        if len(ids) - 1 <= T or target <= T:
            start = 0
        else:
            start = min(-(-(target - T) // stride) * stride, len(ids) - 1 - T)
        window = np.zeros(T, np.int32)
        window[: target - start] = ids[start:target]
        logits = np.asarray(apply(model.variables, jnp.asarray(window[None])), np.float64)[0]
        row = logits[target - start - 1]
        total -= row[ids[target]] - row.max() - math.log(np.exp(row - row.max()).sum())
    return total


@pytest.mark.slow
@pytest.mark.parametrize("stride", [T, 8])
def test_a_text_is_scored_document_by_document(tiny_trained, folder, tmp_path, capsys, stride):
    mesh = make_mesh(jax.devices()[:1])
    model = load_model(tiny_trained, mesh)
    tokenizer = model.tokenizer()
    options = [] if stride == T else ["--mode", "sliding", "--stride", str(stride)]
    out = tmp_path / "each.jsonl"
    command = ["--run", str(tiny_trained), "--text", str(folder), *options]
    assert evaluate.main([*command, "--per-document", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    each = [json.loads(line) for line in out.read_text().splitlines()]
    names = [(one["name"], one["number"]) for one in each]
    assert names == [(name, number) for name, number, _ in WANTED]
    assert [one["index"] for one in each] == list(range(4))
    for one, (_, _, text) in zip(each, WANTED, strict=True):
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
        assert one["tokens"] == len(tokens) - 1 and one["bytes"] == len(text.encode())
        assert one["nats"] == pytest.approx(nats(model, tokens, stride), rel=1e-5)
        assert one["bpb"] == pytest.approx(one["nats"] / math.log(2) / one["bytes"], rel=1e-12)
    assert max(one["tokens"] for one in each) > 2 * T
    total = sum(one["nats"] for one in each)
    assert found["loss"] == pytest.approx(total / found["tokens"], rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert found["bytes"] == sum(one["bytes"] for one in each) and found["documents"] == 4
    assert found["bpb"] == pytest.approx(total / math.log(2) / found["bytes"], rel=1e-9)
    assert found["data"]["name"] == "text" and len(found["data"]["hash"]) == 12


@pytest.mark.slow
def test_text_that_was_trained_on_is_refused(tiny_trained, tiny_recipe, tmp_path, capsys):
    texts = (tiny_recipe.parent / "text.txt").read_text().split("\n<|endoftext|>\n")
    some = tmp_path / "some.txt"
    some.write_text("\n<|endoftext|>\n".join([*texts[-3:-1], "of one's own"]))
    command = ["--run", str(tiny_trained), "--text", str(some)]
    with pytest.raises(UserError, match="trained on 2 of its 3 documents") as error:
        evaluate.main(command)
    assert "\n" not in str(error.value) and "--allow-overlap" in str(error.value)
    assert evaluate.main([*command, "--allow-overlap"]) == 0
    out = capsys.readouterr().out
    assert "of 3 documents" in out and "some.txt (" in out and "perplexity" in out


def test_the_whole_text_of_a_training_on_its_first_part_is_refused(tiny_recipe, tmp_path):
    """Preparation cuts a single document, so no hash of a whole document shows it."""
    path, data = tmp_path / "input.txt", tmp_path / "data"
    path.write_text("cab dab\n" * 500)
    tokenizer = load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")
    prepare(PrepareSpec(source=str(path), out=str(data), tokenizer=str(tokenizer.path)), workers=1)
    with pytest.raises(UserError, match="cut like the training text: the model was trained on 1"):
        documents.encode_untrained(str(path), USUAL, tokenizer, data)
    (tmp_path / "other.txt").write_text("dab cab\n" * 500)
    other = documents.encode_untrained(str(tmp_path / "other.txt"), USUAL, tokenizer, data)
    assert len(other.documents) == len(other.heads) == 1


@pytest.mark.slow
def test_standard_input_is_a_text(tiny_trained, monkeypatch, capsys):
    content = io.BytesIO(b"abc\n<|endoftext|>\nde")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    assert evaluate.main(["--run", str(tiny_trained), "--text", "-", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 2 and found["bytes"] == 6 and found["data"]["name"] == "-"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "a", "--data", "b"], "--text and --data both name"),
        (["--per-document", "x.jsonl"], "--per-document, --text-key and --split-on are for --text"),
        (["--text-key", "body"], "are for --text"),
        (["--allow-overlap"], "--allow-overlap is for"),
        (["--text", "a", "--tokens", "9"], "--text scores every document whole"),
        (["--text", "a", "--ngram", "exact"], "--text scores every document whole"),
        (["--text", "a", "--mode", "none", "--tasks", "x"], "--text scores every document whole"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["--artifact", "model.sngpt", *options])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file or folder"), (b"", "no document"), (b"ab\xff", "cannot be read")],
)
def test_what_is_no_text_is_one_line(tiny_trained, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(["--run", str(tiny_trained), "--text", str(path)])
    assert "\n" not in str(error.value)
