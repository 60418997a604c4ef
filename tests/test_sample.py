"""Texts: the request to the generation, the text of its tokens, and the greedy text of a trained
model against a recomputation.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config.recipe import load
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.model.forward import abstract_variables, forward
from sngpt_jax.model.generation import generate
from sngpt_jax.sample import main
from sngpt_jax.weights.source import load_model


@pytest.fixture
def tokenizer(tiny_recipe):
    return load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")


def test_a_text_is_the_prompt_and_what_was_generated(tiny_recipe, tokenizer, monkeypatch):
    a, b = (int(tokenizer.encode(letter)[0]) for letter in "ab")
    asked = []

    def generate_tokens(config, variables, mesh, prompts, **options):
        asked.append((prompts, options))
        return [np.array([b, a], np.int32)]

    monkeypatch.setattr("sngpt_jax.model.generation.generate_tokens", generate_tokens)
    config = load(str(tiny_recipe)).model
    options = {"seq_len": 24, "max_tokens": 3, "temperature": 0.5, "top_k": 9, "seed": 2}
    text = generate(config, {}, make_mesh(), tokenizer, "a", **options)
    assert text == tokenizer.decode([*tokenizer.encode("a"), b, a])
    (((prompt,), given),) = asked
    assert prompt.tolist() == [tokenizer.bos_id, *tokenizer.encode("a")]
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
    assert json.loads(first)["text"].startswith("abc")


def test_what_a_model_says_does_not_command_the_terminal(tiny_trained, monkeypatch, capsys):
    said = "a\tline\nand \x1b[2J\x9b31m\r more"
    monkeypatch.setattr("sngpt_jax.model.generation.generate", lambda *arguments, **options: said)
    assert main(["--run", str(tiny_trained), "--prompt", "abc"]) == 0
    assert capsys.readouterr().out == "a\tline\nand \\x1b[2J\\x9b31m\\x0d more\n"
    assert main(["--run", str(tiny_trained), "--prompt", "abc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == said
