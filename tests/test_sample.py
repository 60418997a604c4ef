"""Sampling: greedy equals step-by-step recomputation, temperature and top-k draw from the right distribution, seeds repeat."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.cli import UserError
from sngpt_jax.data.tokenizer import load_tokenizer
from sngpt_jax.parallel import make_mesh
from sngpt_jax.recipe import load
from sngpt_jax.run_directory import load_model, tokenizer_path
from sngpt_jax.sample import fill, generate
from sngpt_jax.step import forward
from tests import tiny_run

LOGITS = jnp.asarray([0.0, 1.0, 2.0, 3.0, -1.0])


def constant_model(params, tokens_BT):
    """The same distribution everywhere."""
    return jnp.broadcast_to(LOGITS, (*tokens_BT.shape, 5))


def draws(temperature, top_k, vocab_size=5, count=4000):
    buffer, key = jnp.zeros(count + 1, jnp.int32), jax.random.key(0)
    tokens = fill(constant_model, None, buffer, 1, count + 1, key, temperature, top_k, vocab_size)
    return np.bincount(np.asarray(tokens)[1:], minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 2, 5])
def test_frequencies_follow_the_distribution(temperature, top_k):
    logits = np.asarray(LOGITS, np.float64) / temperature
    kept = np.argsort(logits)[-top_k:] if top_k else np.arange(5)
    want = np.zeros(5)
    want[kept] = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    np.testing.assert_allclose(draws(temperature, top_k), want, atol=0.03)
    assert np.all(draws(temperature, top_k)[want == 0] == 0)


def test_temperature_0_takes_the_likeliest():
    np.testing.assert_array_equal(draws(0.0, 0), [0, 0, 0, 1, 0])


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 2), (1.0, 3)])
def test_rows_beyond_the_tokenizers_vocabulary_are_never_drawn(temperature, top_k):
    """Of the five rows the tokenizer has three; the likeliest of all is not among them."""
    logits = np.asarray(LOGITS[:3], np.float64) if temperature else np.array([-np.inf, -np.inf, 0.0])
    logits = np.where(logits < np.sort(logits)[-top_k or 0], -np.inf, logits)
    want = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(draws(temperature, top_k, vocab_size=3)[:3], want, atol=0.03)
    assert np.all(draws(temperature, top_k, vocab_size=3)[3:] == 0)


def test_a_text_of_a_model_with_more_rows_than_tokens_can_be_read(tiny_recipe, monkeypatch):
    tokenizer = load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")
    config = dataclasses.replace(load(str(tiny_recipe)).model, vocab_size=tokenizer.vocab_size + 7)

    def model(params, tokens_BT):
        return jnp.zeros((*tokens_BT.shape, config.vocab_size)).at[..., 5].set(1.0).at[..., tokenizer.vocab_size :].set(9.0)

    monkeypatch.setattr("sngpt_jax.sample.forward", lambda config: model)
    text = generate(config, {}, tokenizer, "", seq_len=8, max_tokens=3, temperature=0.0, top_k=config.vocab_size)
    assert text == tokenizer.decode([5, 5, 5])


def test_a_text_ends_where_the_next_document_begins(monkeypatch, tiny_recipe):
    tokenizer = load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")
    a, b = (int(tokenizer.encode(letter)[0]) for letter in "ab")

    def counting_model(params, tokens_BT):
        """Says a, b, BOS, a at positions 1, 2, 3, 4 after a prompt of nothing."""
        order = jnp.asarray([a, b, tokenizer.bos_id, a, a, a])
        return 10.0 * jax.nn.one_hot(order, tokenizer.vocab_size)[None, : tokens_BT.shape[1]]

    monkeypatch.setattr("sngpt_jax.sample.forward", lambda config: counting_model)
    config = load(str(tiny_recipe)).model
    assert generate(config, {}, tokenizer, "", seq_len=32, max_tokens=4, temperature=0.0) == "ab"


def test_with_ntk_scaling_the_model_sees_the_length_of_its_training(tiny_recipe, monkeypatch):
    """The rotary base follows from the length there, so a short text needs the long buffer."""
    tokenizer = load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")
    lengths = []

    def model(params, tokens_BT):
        lengths.append(tokens_BT.shape[1])
        return jnp.zeros((1, tokens_BT.shape[1], tokenizer.vocab_size)).at[..., 5].set(1.0)

    config = load(str(tiny_recipe)).model
    for ntk, expected in ((0, 4), (16, 24)):
        monkeypatch.setattr("sngpt_jax.sample.forward", lambda config: lambda *arguments: model(*arguments))
        text = generate(
            dataclasses.replace(config, rope_ntk_len=ntk), {}, tokenizer, "", seq_len=24, max_tokens=3, temperature=0.0
        )
        assert text == tokenizer.decode([5, 5, 5])
        assert lengths.pop() == expected


@pytest.mark.slow
def test_greedy_text_equals_recomputation(tiny_trained):
    model = load_model(tiny_trained, make_mesh(jax.devices()[:1]))
    tokenizer = load_tokenizer(tokenizer_path(tiny_trained))
    ids = [tokenizer.bos_id, *tokenizer.encode("abc")]
    prompt_length, apply = len(ids), jax.jit(forward(model.config.model))
    for _ in range(12):
        padded = jnp.asarray([ids + [0] * (32 - len(ids))])  # one shape, one program
        ids.append(int(np.argmax(apply(model.variables, padded)[0, len(ids) - 1])))
    stop = ids.index(tokenizer.bos_id, prompt_length) if tokenizer.bos_id in ids[prompt_length:] else len(ids)
    text = generate(model.config.model, model.variables, tokenizer, "abc", seq_len=32, max_tokens=12, temperature=0.0)
    assert text == tokenizer.decode(ids[1:stop])


@pytest.mark.slow
def test_the_command_repeats_itself_and_says_so_in_json(tiny_trained):
    first = tiny_run.run("sample", "--run", tiny_trained, "--prompt", "abc", "--max-tokens", "20", "--seed", "1", "--json")
    again = tiny_run.run("sample", "--run", tiny_trained, "--prompt", "abc", "--max-tokens", "20", "--seed", "1", "--json")
    other = tiny_run.run("sample", "--run", tiny_trained, "--prompt", "abc", "--max-tokens", "20", "--seed", "2", "--json")
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout != other.stdout
    assert json.loads(first.stdout)["text"].startswith("abc")


def test_a_text_that_does_not_fit_is_refused(tiny_recipe):
    tokenizer = load_tokenizer(tiny_recipe.parent / "data" / "tokenizer.model")
    with pytest.raises(UserError, match="--max-tokens 32 exceed model.max_seq_len = 32"):
        generate(load(str(tiny_recipe)).model, {}, tokenizer, "abc", seq_len=32, max_tokens=32)
