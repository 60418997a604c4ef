"""Likelihoods and greedy texts against a literal numpy model, one text at a time; where texts are
cut, joined and batched.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from sngpt_jax.data.tokenizer.learn import train_sentencepiece
from sngpt_jax.evaluation import likelihood
from sngpt_jax.evaluation.likelihood import LanguageModel, cut_at
from sngpt_jax.model.forward import init_variables
from tests import oracles

ALPHABET = "\x00\x01abcdefghijklmnopqrstuvwxyz .\n"
V, T, BOS = 40, 32, 1
TH = len(ALPHABET)

TINY = ModelConfig(
    vocab_size=V,
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=24,
    max_seq_len=T,
    compute_dtype="float32",
)


class Letters:
    """A token per letter, and one for "th"; spaces around the text are dropped, as by
    SentencePiece's nmt_nfkc.
    """

    bos_id = BOS
    vocab_size = TH + 1

    def encode(self, text):
        letters = text.strip(" ").replace("th", "\xff")
        return np.array([(ALPHABET + "\xff").index(letter) for letter in letters], np.int32)

    def decode(self, ids):
        letters = [*ALPHABET, "th"]
        return "".join(letters[i] for i in ids if i != BOS).lstrip(" ")


def random_params(config):
    shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0))[0])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)


def make(devices=8, most=64, tokenizer=None, **fields):
    model = dataclasses.replace(TINY, **fields)
    data, evaluation = DataConfig(seq_len=T), EvalConfig(device_batch_tokens=most)
    config = Config(model=model, data=data, eval=evaluation)
    mesh = make_mesh(jax.devices()[:devices])
    return LanguageModel(config, random_params(model), tokenizer or Letters(), mesh)


def log_probabilities(model, tokens):
    """ln p(v) after each of `tokens`, [t, V] float64, by the literal model."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), model.variables)
    logits_TV = oracles.gpt(model.config.model, params, np.asarray([tokens]))[0]
    return logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)


def score(model, context, scored):
    """Sum of ln p of the tokens `scored` after the tokens `context`, and whether all are the
    likeliest.
    """
    tokens = [*context, *scored]
    found = log_probabilities(model, tokens[:-1])[len(context) - 1 :]
    return sum(found[i, token] for i, token in enumerate(scored)), all(found.argmax(-1) == scored)


def ids(text):
    return Letters().encode(text).tolist()


LONG = "it was the best of times. it was the worst of times. it was the age"  # more than T tokens

# context, continuation, the tokens before those that are scored, those that are scored
PAIRS = [
    ("", "a", [BOS], "a"),
    ("the cat", " sat", [BOS, *ids("the cat")], " sat"),
    # the space that the context loses is scored
    ("the cat ", "sat on", [BOS, *ids("the cat")], " sat on"),
    ("cow", "hats.", [BOS, *ids("cow")], "hats."),
    ("at", "hen", [BOS, *ids("a")], "then"),  # th spans the border: all of it is scored
    ("dog", "", [BOS, *ids("dog")], ""),
    ("dog", "  ", [BOS, *ids("dog")], ""),  # dropped by the tokenizer
    (LONG, " of", [*ids(LONG + " of")[-T - 1 : -3]], " of"),  # cut from the left, BOS too
    ("a" * 29, "bcd", [BOS, *ids("a" * 29)], "bcd"),  # T inputs, the most there is room for
    ("a" * 30, "bcd", ids("a" * 30), "bcd"),
]


def test_a_continuation_equals_the_literal_model():
    model = make()
    found = model.loglikelihood([pair[:2] for pair in PAIRS])
    for (*pair, before, text), got in zip(PAIRS, found, strict=True):
        scored = [ALPHABET.index(" ")] * text.startswith(" ") + ids(text)
        wanted, greedy = score(model, before, scored) if scored else (0.0, True)
        assert (got.tokens, got.greedy) == (len(scored), greedy), pair
        assert got.logprob == pytest.approx(wanted, abs=2e-4), pair


@pytest.mark.parametrize("length", [1, 31, 32, 33, 65, 100])
def test_rolling_windows_are_those_of_lm_eval(length):
    """Their tokens, as its own function gives them, scored by the literal model."""
    utils = pytest.importorskip("lm_eval.utils")
    model = make()
    tokens = np.random.default_rng(length).integers(2, 28, length).tolist()
    text = "".join(ALPHABET[token] for token in tokens).replace("th", "tt")
    wanted = 0.0
    for inputs, targets in utils.get_rolling_token_windows(
        ids(text), prefix_token=BOS, max_seq_len=T, context_len=1
    ):
        wanted += log_probabilities(model, inputs)[np.arange(-len(targets), 0), targets].sum()
    [pair] = model.loglikelihood([("", text)])
    assert (pair.logprob, pair.tokens) == (pytest.approx(wanted, abs=1e-3), length)


def test_a_long_continuation_is_greedy_only_where_all_its_rows_are():
    """T random letters, then the likeliest: the second of two rows is greedy."""
    model = make()
    for seed in range(100):
        letters = np.random.default_rng(seed).integers(2, 10, T).tolist()
        likeliest = int(log_probabilities(model, letters)[-1].argmax())
        if 2 <= likeliest < 28:  # a letter
            break
    text = "".join(ALPHABET[token] for token in [*letters, likeliest])
    assert ids(text) == [*letters, likeliest]
    [whole], [end] = model.loglikelihood([("", text)]), model.loglikelihood([(text[:-1], text[-1])])
    assert (whole.tokens, whole.greedy) == (T + 1, False)
    assert (end.tokens, end.greedy) == (1, True)


def test_the_others_change_nothing():
    """Alone, in another order, in larger batches, on other devices."""
    rng = np.random.default_rng(0)
    words = ["".join(ALPHABET[i] for i in rng.integers(2, 30, n)) for n in rng.integers(1, 50, 60)]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    model = make()
    wanted = model.loglikelihood(pairs)
    assert wanted[7].logprob != wanted[8].logprob
    for other, chosen in [(model, [7]), (model, range(30)[::-1]), (make(1, 10_000), range(30))]:
        got = other.loglikelihood([pairs[i] for i in chosen])
        for one, i in zip(got, chosen, strict=True):
            assert one.tokens == wanted[i].tokens
            assert one.logprob == pytest.approx(wanted[i].logprob, rel=1e-5)
    assert model.loglikelihood([]) == []


def test_with_ntk_scaling_a_short_text_has_the_rotary_base_of_training():
    model = make(rope_ntk_len=5)
    tokens = [BOS, *ids("the cat")]
    padded = log_probabilities(model, tokens + [0] * (T - len(tokens)))
    wanted = sum(padded[i, token] for i, token in enumerate(tokens[1:]))
    [got] = model.loglikelihood([("", "the cat")])
    assert got.logprob == pytest.approx(wanted, abs=1e-4)
    # or this would test nothing
    assert log_probabilities(model, tokens)[5, 3] != pytest.approx(padded[5, 3], abs=1e-3)


def test_batches_have_few_shapes_and_keep_to_the_budget(monkeypatch):
    shapes = set()

    def fake_step(*_):
        def step(variables, batch):
            inputs, targets, offsets = (
                np.asarray(batch[name]) for name in ("inputs", "targets", "offsets")
            )
            assert inputs.size <= 64 * 8 and len(inputs) % 8 == 0
            assert np.all(offsets + targets.shape[1] <= inputs.shape[1])
            shapes.add((inputs.shape, targets.shape[1]))
            ones = np.ones(targets.shape, np.float32)
            return {"nll": ones, "greedy": ones > 0}

        return step

    monkeypatch.setattr(likelihood, "_eval_step", fake_step)
    seen = []
    pairs = [("a" * n, "b" * m) for n in range(31) for m in (1, 2, 5)] * 3
    found = make().loglikelihood(pairs, lambda done, total: seen.append((done, total)))
    assert [(-one.logprob, one.tokens) for one in found] == [(len(b), len(b)) for _, b in pairs]
    # of T = 16 and 32, and the most that any scores, 5, rounded up
    assert shapes == {((4 * 8, 16), 8), ((2 * 8, 32), 8)}
    assert seen[-1] == (len(pairs), len(pairs))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_losses_that_are_not_finite_are_one_line():
    model = make()
    broken = jax.tree.map(lambda a: a * np.nan, model.variables)
    with pytest.raises(UserError, match="not finite"):
        dataclasses.replace(model, variables=broken).loglikelihood([("", "a")])


def test_a_tokenizer_of_another_vocabulary_is_one_line():
    wanted = "the tokenizer has 32 tokens, more than model.vocab_size = 31"
    with pytest.raises(UserError, match=wanted):
        make(vocab_size=TH)


def test_a_sentencepiece_tokenizer_that_drops_spaces_loses_no_word(tmp_path):
    """Its tokens of context and continuation together, but for the context's, are scored; alone
    the word is another token.
    """
    text = ["the cat sat on the mat and the dog sat on the log " * 5 + "xyz"]
    options = {"vocab_size": 300, "normalization": "nmt_nfkc"}
    tokenizer = train_sentencepiece(text, tmp_path / "t.model", **options)
    model = make(tokenizer=tokenizer, vocab_size=304)
    context, alone, together = (
        tokenizer.encode(text).tolist() for text in ("the cat", " sat", "the cat sat")
    )
    rest = together[len(context) :]
    assert together == context + rest and alone != rest
    wanted, _ = score(model, [tokenizer.bos_id, *context], rest)
    for got in model.loglikelihood([("the cat", " sat"), ("the cat ", "sat")]):
        assert (got.logprob, got.tokens) == (pytest.approx(wanted, abs=2e-4), len(rest))


# --------------------------------------------------------------------------------------- generation


def greedy_text(model, tokens, count):
    """The likeliest tokens of the tokenizer's vocabulary, one by one, up to BOS."""
    added = []
    for _ in range(count):
        known = log_probabilities(model, [*tokens, *added])[-1, : model.tokenizer.vocab_size]
        if (token := int(known.argmax())) == BOS:
            break
        added.append(token)
    return added


def test_greedy_texts_equal_full_recomputation_and_are_greedy_continuations():
    model = make()
    prompts = ["the cat", "a", "", "it was the best of times", LONG, "dog"]
    texts, decode = model.generate(prompts, [], 6), model.tokenizer.decode
    for prompt, text in zip(prompts, texts, strict=True):
        head = [BOS, *ids(prompt)][-(T - 6) :]
        assert decode(head) + text == decode(head + greedy_text(model, head, 6))
    [found] = model.loglikelihood([("the cat", texts[0])])
    assert found.greedy and found.tokens
    other = "z" if texts[0][0] != "z" else "y"
    assert not model.loglikelihood([("the cat", other)])[0].greedy


def test_what_is_asked_of_the_generator(monkeypatch):
    """Prompts cut from the left, longest first, as many at a time as fit; texts up to a stop, in
    their prompts' order.
    """
    calls = []

    def fake(config, variables, mesh, prompts, **options):
        calls.append(([p.tolist() for p in prompts], options))
        return [np.array(ids(f"x the{'b' * len(p)}. no"), np.int32) for p in prompts]

    monkeypatch.setattr(likelihood, "generate_tokens", fake)
    seen = []
    options, until = {"temperature": 0.5, "top_k": 3}, ["zz", " no", "."]
    progress = {"seed": 7, "progress": lambda *counts: seen.append(counts)}
    model = make(devices=1, most=2 * T)
    texts = model.generate(["c", "ab", LONG], until, 8, **options, **progress)
    assert texts == ["x thebb", "x thebbb", "x the" + "b" * 24]
    options |= {"seq_len": T, "max_tokens": 8, "vocab_size": TH + 1, "end_id": BOS}
    assert calls == [
        ([ids(LONG)[-24:], [BOS, *ids("ab")]], {**options, "seed": 7}),
        ([[BOS, *ids("c")]], {**options, "seed": 8}),
    ]
    assert seen == [(2, 3), (3, 3)]


def test_a_space_that_begins_the_added_text_is_kept(monkeypatch):
    added = [np.array([ALPHABET.index(" "), 2], np.int32)]
    monkeypatch.setattr(likelihood, "generate_tokens", lambda *_, **__: added)
    assert make().generate(["dog"], [], 2) == [" a"]


@pytest.mark.parametrize("max_tokens", [0, T, math.inf])
def test_no_room_for_a_prompt_is_one_line(max_tokens):
    with pytest.raises(UserError, match="data.seq_len = 32"):
        make().generate(["a"], [], max_tokens)


def test_cut_at():
    assert cut_at("one. two\nthree", ["\n", ". "]) == "one"
    assert cut_at("one", ["\n", ""]) == "one"
    assert cut_at("\none", ["one", "\n"]) == ""
