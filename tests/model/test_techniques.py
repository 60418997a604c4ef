"""The whole model under each technique against float64, and that each switch does something."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sngpt_jax.config import ModelConfig
from sngpt_jax.model.forward import abstract_parts, forward, init_variables
from tests import oracles

TINY = ModelConfig(
    vocab_size=29,
    num_layers=4,
    d_model=24,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=20,
    max_seq_len=16,
    rope_base=50.0,  # turns every pair visibly within a few positions
    compute_dtype="float32",
)
TOKENS = np.random.default_rng(7).integers(0, 29, (2, 9))
TOKENS[:, [0, 3, 4]] = 1  # documents that start there
TOKENS[:, 6] = TOKENS[:, 5]

BIGRAM = {"bigram_buckets": 13, "bigram_dim": 5}
VALUE_EMBED = {"value_embed_layers": (3, 1), "value_embed_dim": 5}

TECHNIQUES = {
    "plain": {},
    "partial_rope": {"rope_dims": 4},
    "rope_base": {"rope_base": 500.0},
    "ntk": {"rope_ntk_len": 5},
    "xsa_last": {"xsa_layers": 1},
    "xsa_all": {"xsa_layers": 4},
    "smear_after_norm": {"smear": "after_norm"},
    "smear_before_norm": {"smear": "before_norm"},
    "smear_mask_after": {"smear": "after_norm", "smear_mask_bos": True},
    "smear_mask_before": {"smear": "before_norm", "smear_mask_bos": True},
    "bigram_xor": BIGRAM,
    "bigram_sum_unscaled": {**BIGRAM, "bigram_hash": "sum", "bigram_scale_init": 0.0},
    "value_embed": VALUE_EMBED,
    "value_residual": {"value_residual": True},
    "attention_gate": {"attention_gate": True},
    "recycle": {"recycle_layers": (1, 0)},
    "ln_scale": {"ln_scale": True},
    "leaky_relu2": {"mlp_activation": "leaky_relu2"},
    "logit_soft_cap": {"logit_soft_cap": 3.0},
}
STACKS = {  # the techniques of the four recipes, together
    "11l_xsa4": {"num_layers": 5, "xsa_layers": 2, "smear": "after_norm", **BIGRAM},
    "9l_xsa_ngram": {
        "num_layers": 3,
        "rope_dims": 4,
        "xsa_layers": 3,
        "ln_scale": True,
        "mlp_activation": "leaky_relu2",
        "smear": "before_norm",
        **BIGRAM,
        "bigram_hash": "sum",
        "bigram_scale_init": 0.0,
    },
    "12l_recycled": {
        "rope_dims": 4,
        "rope_ntk_len": 5,
        "xsa_layers": 2,
        "ln_scale": True,
        "mlp_activation": "leaky_relu2",
        "smear": "after_norm",
        **BIGRAM,
        **VALUE_EMBED,
        "value_residual": True,
        "attention_gate": True,
        "recycle_layers": (0, 1),
    },
}


def changed(**fields):
    return dataclasses.replace(TINY, **fields)


def random_params(config):
    """Parameters by their name and shape alone, without the zeros and ones of the start."""

    def draw(path, leaf):
        rng = np.random.default_rng([0, *jax.tree_util.keystr(path).encode()])
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.4, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_parts(config)[0])


@functools.cache
def initial_params(config):
    return jax.jit(lambda: init_variables(config, jax.random.key(3))[0])()


@functools.cache
def compiled(config):
    return jax.jit(forward(config))


def logits(config, params=None, tokens=TOKENS):
    """Of `params`, or of `random_params`."""
    return np.asarray(compiled(config)(random_params(config) if params is None else params, tokens))


def functional(module):
    """The pure function (parameters, *inputs) of a module, and its parameters drawn at random."""
    graph, state = nnx.split(module, nnx.Param)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), nnx.to_pure_dict(state)
    )
    return lambda params, *args, **kwargs: nnx.merge(graph, params)(*args, **kwargs), params


def double(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize("name", [*TECHNIQUES, *STACKS])
def test_logits_equal_the_oracle(name):
    config = changed(**{**TECHNIQUES, **STACKS}[name])
    want = oracles.gpt(config, double(random_params(config)), TOKENS)
    np.testing.assert_allclose(logits(config), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["9l_xsa_ngram", "12l_recycled"])
def test_gradients_of_the_whole_model_equal_the_oracle(name):
    config = changed(**STACKS[name])
    oracles.check(
        lambda p: forward(config)(p, TOKENS),
        lambda p: oracles.gpt(config, p, TOKENS),
        random_params(config),
        tol=1e-4,
        directions=1,
    )


@pytest.mark.parametrize("name", list(TECHNIQUES)[1:])
def test_every_switch_switches_something(name):
    """Same values of all parameters that both models have, and yet other logits."""
    assert np.abs(logits(changed(**TECHNIQUES[name])) - logits(TINY)).max() > 1e-2


@pytest.mark.parametrize("smear", ["after_norm", "before_norm"])
def test_the_mask_of_the_smear_switches_something(smear):
    masked, open_ = (logits(changed(smear=smear, smear_mask_bos=mask)) for mask in (True, False))
    difference = np.abs(masked - open_)
    assert difference.max() > 1e-2
    assert np.abs(difference[:, :3]).max() < 1e-4  # before the second document starts


@pytest.mark.parametrize("name", [*TECHNIQUES, *STACKS])
def test_no_logit_depends_on_a_later_token(name):
    config = changed(**{**TECHNIQUES, **STACKS}[name])
    params, at = random_params(config), 5
    moved = TOKENS.copy()
    moved[:, at:] = (moved[:, at:] + 7) % 29
    before, after = logits(config, params), logits(config, params, moved)
    assert np.array_equal(before[:, :at], after[:, :at])
    assert np.all(np.any(before[:, at:] != after[:, at:], axis=-1))


def test_ln_scale_is_one_at_the_first_layer():
    scaled, plain = (logits(changed(num_layers=1, ln_scale=scale)) for scale in (True, False))
    assert np.array_equal(scaled, plain)


def test_soft_cap_bounds_and_vanishes():
    assert np.abs(logits(changed(logit_soft_cap=3.0))).max() < 3.0
    free = logits(changed(logit_soft_cap=1e6))
    np.testing.assert_allclose(logits(TINY), 30 * np.tanh(free / 30), rtol=0, atol=1e-4)
