"""Generation against whole sequences and windows in float64; ends, and what is refused."""

import dataclasses
import functools
from itertools import pairwise
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh, state_shardings
from sngpt_jax.config import parse_levels
from sngpt_jax.model import generation
from sngpt_jax.model.forward import forward
from sngpt_jax.model.generation import draw, generate_tokens, grow
from tests import oracles
from tests.model import test_pre_norm as pre_norm
from tests.model.test_techniques import BIGRAM, STACKS, changed, double, random_params

TINY = changed(num_layers=2)
MODELS = {
    "most techniques": changed(max_seq_len=24, **STACKS["12l_recycled"]),
    "masked, recycled": changed(
        num_layers=2,
        max_seq_len=24,  # prompts are filled up to 16 positions, texts to these
        rope_ntk_len=5,
        xsa_layers=2,
        smear="before_norm",
        smear_mask_bos=True,
        recycle_layers=(0, 0),
        value_residual=True,
        **BIGRAM,
        bigram_hash="sum",
    ),
    # both are filled up to these
    "learned positions": dataclasses.replace(pre_norm.DENSE, num_layers=2, max_seq_len=13),
    "coded, rotary": dataclasses.replace(
        pre_norm.CODED, num_layers=1, levels=parse_levels("5,4,0"), positions="rotary", qk_norm=True
    ),
}
# with tensors large enough to be split over devices
SPLIT = changed(num_layers=1, vocab_size=64, d_model=64)
PROMPTS = [np.array(ids) for ids in ([1], [5, 1], [1, 3, 1], [1, 9, 9, 1, 20, 7], [2, 2, 28, 4])]
LONG = np.array([7, 1, 4, 4, 1, 12, 3, 28, 9, 1, 6, 2])
SEQ_LEN = 12  # with seven new tokens some texts are shorter and some longer


@functools.cache
def variables(config):
    return (random_params if config.family == "compact" else pre_norm.random_variables)(config)


def generate(config, prompts, devices=1, fsdp=1, steps=False, **options):
    defaults = {"seq_len": SEQ_LEN, "max_tokens": 7, "vocab_size": config.vocab_size, "end_id": -1}
    options = {**defaults, **options}
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    placed = jax.device_put(variables(config), state_shardings(mesh, variables(config)))
    if steps:
        return grow(config, placed, mesh, prompts, **options)
    return [ids.tolist() for ids in generate_tokens(config, placed, mesh, prompts, **options)]


def oracle(config, tokens, length):
    """Float64 logits of a text that is filled up to `length`, which decides NTK scaling."""
    function = oracles.gpt if config.family == "compact" else pre_norm.oracle
    filled = np.pad(tokens, (0, length - len(tokens)))[None]
    return function(config, double(variables(config)), filled)[0, : len(tokens)]


@pytest.fixture
def seen(monkeypatch):
    """What every draw is made of: `logits` by (row, position) of up to eight rows, and `draws`."""
    found = SimpleNamespace(logits={}, draws=0)
    row_keys = [generation.row_key(jax.random.key(0), jnp.int32(row)) for row in range(8)]
    keys = [jax.random.key_data(key).tolist() for key in row_keys]

    def note(key, position, logits):
        found.logits[keys.index(key.tolist()), int(position)] = np.asarray(logits)
        found.draws += 1

    def observed(logits, key, position, temperature, **options):
        jax.debug.callback(note, jax.random.key_data(key), position, logits)
        return draw(logits, key, position, temperature, **options)

    monkeypatch.setattr(generation, "draw", observed)
    generation._programs.cache_clear()
    yield found
    generation._programs.cache_clear()


QUICK = "masked, recycled"


@pytest.mark.parametrize(
    "name",
    [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_logits_equal_those_of_the_whole_text(name, seen):
    """Texts of different lengths side by side, and each with the rotary base of its own length."""
    config = MODELS[name]
    prompts = [prompt for prompt in (*PROMPTS, LONG) if len(prompt) + 7 <= config.max_seq_len]
    new = generate(config, prompts)
    jax.effects_barrier()
    assert len(seen.logits) == 7 * len(prompts) >= 7 * len(PROMPTS)
    for row, (prompt, added) in enumerate(zip(prompts, new, strict=True)):
        text = np.array([*prompt, *added])
        wanted = oracle(config, text, max(len(text), SEQ_LEN))
        got = np.stack([seen.logits[row, position] for position in range(len(prompt), len(text))])
        np.testing.assert_allclose(got, wanted[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4)
        assert added == np.argmax(got, axis=1).tolist()


@pytest.mark.slow
def test_a_text_does_not_depend_on_those_beside_it_or_on_the_devices():
    """Together on four devices, two per copy of the weights, and each alone on one."""
    together = generate(SPLIT, PROMPTS, devices=4, fsdp=2)
    assert len({tuple(text) for text in together}) == len(PROMPTS)
    assert [generate(SPLIT, [prompt])[0] for prompt in PROMPTS] == together


def test_draws_are_those_of_full_recomputation():
    """Of row 0 with the seed's own key folded with the position; the others' keys are their own."""
    ids = [1, 5]
    for position in range(2, 9):
        logits = jnp.asarray(oracle(TINY, np.array(ids), len(ids))[-1, :20] / 0.7, jnp.float32)
        key = jax.random.fold_in(jax.random.key(3), position)
        ids.append(int(jax.random.categorical(key, logits)))
    options = {"vocab_size": 20, "temperature": 0.7, "seed": 3}
    rows = generate(TINY, [np.array([1, 5])] * 4, **options)
    assert rows[0] == ids[2:] and len({tuple(row) for row in rows}) == 4
    assert generate(TINY, [np.array([1, 5])] * 3, **options) == rows[:3]
    assert generate(TINY, [np.array([1, 5])] * 4, **{**options, "seed": 4})[0] != rows[0]


def test_a_text_ends_before_its_end_and_the_program_with_the_last(seen):
    prompts, end = [np.array([first]) for first in (0, 1, 4)], 24
    whole = generate(TINY, prompts)
    assert [text.index(end) for text in whole] == [1, 2, 0]
    assert all(text.count(end) == 1 for text in whole)
    jax.effects_barrier()
    seen.draws = 0
    assert generate(TINY, prompts, end_id=end) == [text[: text.index(end)] for text in whole]
    jax.effects_barrier()
    assert seen.draws == 3 * 4  # steps, of seven, and rows, of which the last repeats the first


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_as_many_tokens_as_asked_for(max_tokens):
    texts = [text[:max_tokens] for text in generate(TINY, PROMPTS)]
    assert generate(TINY, PROMPTS, max_tokens=max_tokens) == texts


@pytest.mark.slow
def test_half_precision_stays_near_its_own_recomputation(seen):
    config = changed(
        num_layers=1, compute_dtype="bfloat16", value_embed_layers=(0,), value_embed_dim=5
    )
    (new,) = generate(config, [PROMPTS[3]])
    jax.effects_barrier()
    text = jnp.asarray([[*PROMPTS[3], *new]])
    wanted = np.asarray(jax.jit(forward(config))(variables(config), text)[0, 5:-1])
    got = np.stack([seen.logits[0, position] for position in range(6, 13)])
    assert got.dtype == np.float32
    assert np.linalg.norm(got - wanted) < 0.03 * np.linalg.norm(wanted)


# ------------------------------------------------------------------------------ windows


@given(st.integers(2, 40), st.integers(0, 200))
def test_windows_hold_what_a_model_takes_and_at_least_half_of_it(most, number):
    """By walking: the first window fills up, and then each begins with the last most // 2."""
    start = fills_up = 0
    for n in range(number + 1):
        if n == (most if not start else fills_up):
            start = n - most // 2
            fills_up = n + most // 2
    found, upto = generation.window(number, most)
    assert found == start and number < upto
    assert upto - found <= most and (not found or number - found >= most // 2)
    assert generation.window(upto - 1, most)[0] == found != generation.window(upto, most)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked, recycled", "learned positions"])
def test_a_text_beyond_the_context_goes_on_in_windows(name):
    """Each greedy token is the likeliest of a float64 pass over its window alone. One prompt
    outgrows the context at once, one later, and one is short enough for a single window.
    """
    config = dataclasses.replace(MODELS[name], max_seq_len=13)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, config.vocab_size, n) for n in (3, 30, 13, 1)]
    new = generate(config, prompts, max_tokens=25)
    for prompt, added in zip(prompts, new, strict=True):
        assert len(added) == 25
        text = np.array([*prompt, *added])
        for n in range(len(prompt), len(text)):
            start, _ = generation.window(n, 13)
            logits = oracle(config, text[start:n], 13)[-1]
            best = logits.max()
            assert logits[text[n]] > best - 1e-4 * max(1, abs(best))


def test_windows_and_pieces_change_no_draw():
    """Tokens one by one, three by three and all at once; another first number shifts the rows."""
    config = dataclasses.replace(TINY, max_seq_len=9)
    options = {"temperature": 0.9, "max_tokens": 14, "seed": 2, "top_p": 0.9, "end_id": 3}
    whole = generate(config, PROMPTS, **options)
    assert len({len(text) for text in whole}) > 1  # some end early
    for at_a_time in (1, 3):
        seen = list(generate(config, PROMPTS, steps=True, at_a_time=at_a_time, **options))
        assert [text.tolist() for text in seen[-1].added] == whole
        assert all(seen[-1].complete) and not all(seen[0].complete)
        for before, after in pairwise(seen):
            for i, text in enumerate(whole):
                assert before.added[i].tolist() == text[: len(before.added[i])]
                assert 0 <= len(after.added[i]) - len(before.added[i]) <= at_a_time + 1
                assert before.complete[i] <= after.complete[i]
                assert not before.complete[i] or len(before.added[i]) == len(text)
    assert generate(config, PROMPTS[2:], first=2, **options) == whole[2:]


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 2], []], {}, "a prompt has no tokens"),
        ([[1]], {"max_tokens": 0}, "max_tokens = 0 must be"),
        ([[1]], {"temperature": -0.1}, "temperature = -0.1 must be"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan must be"),
        ([[1]], {"temperature": float("inf")}, "temperature = inf must be"),
        ([[1]], {"top_k": -1}, "top_k = -1 must be"),
        ([[1]], {"top_p": 0.0}, "top_p = 0.0 must be"),
        ([[1]], {"top_p": 1.5}, "top_p = 1.5 must be"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompts, options, message):
    with pytest.raises(UserError, match=message) as error:
        generate(TINY, [np.array(ids, np.int64) for ids in prompts], **options)
    assert "\n" not in str(error.value)


def test_no_prompts_no_texts():
    assert generate(TINY, []) == []
