"""Texts: the request to the generation, the text of its tokens, and the greedy text of a trained
model against a recomputation.
"""

import dataclasses
import io
import json
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config.recipe import load
from sngpt_jax.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from sngpt_jax.model.forward import abstract_variables, forward
from sngpt_jax.model.generation import Grown, generate
from sngpt_jax.sample import Pieces, main, stream
from sngpt_jax.weights.source import load_model
from tests.screen import Screen


@pytest.fixture
def tokenizer(tiny_recipe):
    return load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")


def said(monkeypatch, *texts):
    """Lets the generator say these tokens, one after the other; returns what it is asked."""
    asked = []

    def grow(config, variables, mesh, prompts, **options):
        asked.append(([prompt.tolist() for prompt in prompts], options))
        rows = [np.array(texts[i % len(texts)], np.int32) for i in range(len(prompts))]
        for count in range(1, max(map(len, rows)) + 1):
            yield Grown([row[:count] for row in rows], [len(row) <= count for row in rows])

    monkeypatch.setattr("sngpt_jax.model.generation.grow", grow)
    return asked


def test_a_text_is_the_prompt_and_what_was_generated(tiny_recipe, tokenizer, monkeypatch):
    a, b = (int(tokenizer.encode(letter)[0]) for letter in "ab")
    asked = said(monkeypatch, [b, a])
    config = load(str(tiny_recipe)).model
    options = {"seq_len": 24, "max_tokens": 3, "temperature": 0.5, "top_k": 9, "seed": 2}
    text = generate(config, {}, make_mesh(), tokenizer, "a", **options)
    assert text == tokenizer.decode([*tokenizer.encode("a"), b, a])
    (([prompt], given),) = asked
    assert prompt == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert given == {**options, "vocab_size": tokenizer.vocab_size, "end_id": tokenizer.bos_id}


def test_a_text_of_a_model_with_more_rows_than_tokens_can_be_read(tiny_recipe, tokenizer):
    """Rows of the table that no text has trained may be the most probable."""
    rows = tokenizer.vocab_size + 7
    config = dataclasses.replace(load(str(tiny_recipe)).model, vocab_size=rows, num_layers=1)
    shapes = abstract_variables(config)
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    params["embed"]["table"][tokenizer.vocab_size :] = 100.0
    options = {"seq_len": 8, "max_tokens": 3, "temperature": 1.0, "top_k": config.vocab_size}
    assert generate(config, params, make_mesh(jax.devices()[:1]), tokenizer, "", **options)


@pytest.mark.slow
def test_greedy_text_equals_recomputation(tiny_trained, tokenizer):
    mesh = make_mesh(jax.devices()[:1])
    model = load_model(tiny_trained, mesh)
    ids = [tokenizer.bos_id, *tokenizer.encode("abc")]
    prompt_length, apply = len(ids), jax.jit(forward(model.config.model))
    for _ in range(12):
        padded = jnp.asarray([ids + [0] * (32 - len(ids))])  # one shape, one program
        ids.append(int(np.argmax(apply(model.variables, padded)[0, len(ids) - 1])))
    stop = [*ids, tokenizer.bos_id].index(tokenizer.bos_id, prompt_length)
    options = {"seq_len": 32, "max_tokens": 12, "temperature": 0.0}
    text = generate(model.config.model, model.variables, mesh, tokenizer, "abc", **options)
    assert text == tokenizer.decode(ids[1:stop])


@pytest.mark.slow
def test_the_command_repeats_itself_and_says_so_in_json(tiny_trained, capsys):
    printed = []
    for seed in ("1", "1", "2"):
        arguments = ["--run", str(tiny_trained), "--prompt", "abc", "--max-tokens", "20"]
        assert main([*arguments, "--seed", seed, "--json"]) == 0
        printed.append(capsys.readouterr().out)
    first, again, other = printed
    assert first == again != other
    (sample,) = json.loads(first)["samples"]
    assert sample["text"].startswith("abc") and sample["prompt"] == "abc"
    assert sample["ended"] == (sample["tokens"] < 20)


@pytest.mark.slow
def test_prompts_of_a_file_or_stdin_have_texts_of_their_own(
    tiny_trained, tmp_path, monkeypatch, capsys
):
    """Two prompts, two texts each. A text depends on neither the batch nor the terminal."""
    content = "abc\n<|endoftext|>\nde\nf\n"
    (tmp_path / "prompts.txt").write_text(content)
    command = ["--run", str(tiny_trained), "--samples", "2", "--max-tokens", "40"]
    assert main([*command, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    plain = capsys.readouterr().out
    texts = plain.split("<|endoftext|>\n")
    assert len(texts) == len(set(texts)) == 4
    for text, start in zip(texts, ["abc"] * 2 + ["de\nf"] * 2, strict=True):
        assert text.startswith(start)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    assert main([*command, "--prompts", "-"]) == 0  # in pieces, on a terminal
    assert screen.getvalue() == plain
    monkeypatch.undo()
    assert main([*command[:2], "--max-tokens", "40", "--prompt", "abc"]) == 0
    assert capsys.readouterr().out == texts[0]


def test_what_a_model_says_does_not_command_the_terminal(tiny_trained, monkeypatch, capsys):
    text = "a\tline\nand \x1b[2J\x9b31m\r more"
    said(monkeypatch, [5])
    monkeypatch.setattr(SentencePieceTokenizer, "decode", lambda *_: text)
    assert main(["--run", str(tiny_trained), "--prompt", "abc"]) == 0
    assert capsys.readouterr().out == "a\tline\nand \\x1b[2J\\x9b31m\\x0d more\n"
    assert main(["--run", str(tiny_trained), "--prompt", "abc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["text"] == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "-1"], "--top-k must be 0 or more"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--samples", "0"], "--samples must be 1 or more"),
        (["--temperature", "nan"], "--temperature must be a finite number"),
        (["--prompt", "a", "--prompts", "b"], "give either --prompt or --prompts"),
        (["--prompts", "nowhere.txt"], "no such file or folder"),
    ],
)
def test_what_cannot_be_asked_for(options, message):
    with pytest.raises(UserError, match=message):
        main(options)


# ------------------------------------------------------------------------------ pieces


def as_bytes(ids):
    """A tokenizer of single bytes."""
    return bytes(ids).decode(errors="replace")


@given(st.lists(st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=3))), st.data())
def test_pieces_add_up_to_the_text_and_hold_whole_characters(parts, data):
    """Of any bytes, cut anywhere: only a character that the bytes do not spell is replaced."""
    content = b"".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    pieces, out = Pieces(as_bytes), []
    for start, stop in pairwise([0, *cuts, len(content)]):
        out.append(pieces.add(list(content[start:stop]), last=stop == len(content)))
        assert as_bytes(content).startswith("".join(out))
    assert "".join(out) == as_bytes(content)


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tokenizer):
    """The SentencePiece model spells these in single bytes."""
    ids = tokenizer.encode("ab 🦜é").tolist()
    pieces = Pieces(tokenizer.decode)
    shown = [pieces.add([token]) for token in ids]
    assert "".join(shown) == "ab 🦜é" and shown.count("🦜") == shown.count("é") == 1
    assert len(ids) >= 8 and not any("\ufffd" in piece for piece in shown)


def test_texts_stream_one_after_the_other(capsys):
    """The second text waits until the first is complete; what has grown by then comes at once."""
    heads = [np.array([0, 104]), np.array([0, 105])]
    first, second = [np.frombuffer(text.encode(), np.uint8) for text in ("é!", "xyz")]
    shown = []

    def growing():
        for count, complete in ((1, [False, False]), (2, [False, True]), (3, [True, True])):
            yield Grown([first[:count], second[:count]], complete)
            shown.append(capsys.readouterr().out)

    grown = stream(growing(), heads, as_bytes, begun=1)
    assert shown == ["<|endoftext|>\nh", "é", "!\n<|endoftext|>\nixyz\n"]
    assert grown.complete == [True, True]
