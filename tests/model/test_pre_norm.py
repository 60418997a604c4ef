"""The pre-norm family against a literal numpy forward pass, and what it starts from."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from sngpt_kernels.cayley import reference

from sngpt_jax.config import ModelConfig, parse_levels
from sngpt_jax.model.cayley import sample_positions
from sngpt_jax.model.forward import (
    abstract_variables,
    forward,
    init_variables,
    losses,
    tapped_losses,
)
from tests import oracles
from tests.model.test_techniques import compiled, double

DENSE = ModelConfig(
    family="pre_norm",
    vocab_size=61,
    num_layers=3,
    d_model=32,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=48,
    mlp_activation="gelu",
    max_seq_len=16,
    positions="learned",
    qk_norm=False,
    matrix_init="normal",
    embed_init_std=0.02,
    logit_soft_cap=0.0,
    norm_eps=1e-5,
    compute_dtype="float32",
)
CODED = dataclasses.replace(DENSE, levels=parse_levels("5,4,0;7,8,16;8,8,8"))
TOKENS = np.random.default_rng(1).integers(0, 61, (2, 12))


def encode(config, code, x):
    """The code of x [..., D], with its leading axes made one."""
    return reference.encode_decode(
        x.reshape(-1, x.shape[-1]),
        code["mean"],
        code["std"],
        code["bias"],
        config.levels,
        forward_standardized=config.forward_standardized,
        generators=config.generators,
    )


def oracle(config, p, tokens):
    """Logits [B, T, V] of variables `p`, from the definition."""

    def normed(x, gain):
        return gain * oracles.rms_norm(x, config.norm_eps)

    def heads(x):
        return x.reshape(*x.shape[:2], config.num_heads, -1)

    x = p["embed"]["table"][tokens]
    if config.positions == "learned":
        x = x + p["positions"]["table"][: tokens.shape[1]]
    for block in p["blocks"].values():
        u, attn = normed(x, block["attn_norm"]), block["attn"]
        q, k, v = (heads(u @ attn[name]) for name in ("query", "key", "value"))
        if config.qk_norm:
            q, k = (oracles.rms_norm(a, config.norm_eps) for a in (q, k))
            q = q * attn["q_gain"][:, None]
        if config.positions == "rotary":
            q, k = (oracles.rotary(a, config.head_dim, config.rope_base) for a in (q, k))
        x = x + oracles.attend(q, k, v).reshape(x.shape) @ attn["out"]
        h = normed(x, block["mlp_norm"])
        if config.levels:
            h = encode(config, block["code"], h).x_hat.reshape(h.shape)
        hidden = h @ block["mlp"]["up"]
        x = x + 0.5 * hidden * (1 + erf(hidden / math.sqrt(2))) @ block["mlp"]["down"]
    return normed(x, p["final_norm"]) @ p["embed"]["table"].T


def random_variables(config, seed=0):
    """Variables without the zeros and ones of the start; deviations are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.dtype == jnp.int32:
            return jnp.zeros(leaf.shape, jnp.int32)
        if "std" in jax.tree_util.keystr(path):
            return jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(config))


VARIANTS = {
    "dense": DENSE,
    "dense, rotary and normalized": dataclasses.replace(DENSE, positions="rotary", qk_norm=True),
    "coded": CODED,
    "coded, raw scores carried": dataclasses.replace(CODED, forward_standardized=False),
    "coded, prefix tree": dataclasses.replace(CODED, generators="prefix"),
}


def logits(config, variables, tokens=TOKENS):
    return np.asarray(compiled(config)(variables, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_oracle(name):
    config = VARIANTS[name]
    variables = random_variables(config)
    got = logits(config, variables)
    assert got.dtype == jnp.float32
    wanted = oracle(config, double(variables), TOKENS)
    np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=2e-4)


def test_gradients_equal_the_oracles_slopes():
    oracles.check(
        lambda p: forward(DENSE)(p, jnp.asarray(TOKENS)),
        lambda p: oracle(DENSE, p, TOKENS),
        random_variables(DENSE),
        tol=1e-4,
    )


def test_a_code_changes_the_dense_model_and_its_statistics_count():
    before = logits(CODED, random_variables(CODED))
    for name in ("mean", "std", "bias"):
        other = random_variables(CODED)
        other["blocks"][0]["code"][name] = other["blocks"][0]["code"][name][::-1]
        assert np.any(np.abs(logits(CODED, other) - before) > 1e-3), name


@pytest.mark.parametrize("config", [DENSE, CODED], ids=["dense", "coded"])
def test_no_position_sees_a_later_one(config):
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = (logits(config, random_variables(config), t) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_losses_do_not_depend_on_the_chunk():
    arguments = random_variables(CODED), TOKENS, np.roll(TOKENS, -1)
    whole = jax.jit(losses(CODED))(*arguments)
    chunked = jax.jit(losses(dataclasses.replace(CODED, logit_chunk=5)))(*arguments)
    np.testing.assert_allclose(chunked, whole, atol=1e-5)


def test_taps_are_the_codes_inputs_and_choices():
    variables, targets = random_variables(CODED), np.roll(TOKENS, -1)
    _, everywhere = jax.jit(tapped_losses(CODED))(variables, TOKENS, targets, jnp.arange(12))
    _, some = jax.jit(tapped_losses(CODED))(variables, TOKENS, targets, jnp.array([7, 2]))
    assert everywhere.x.shape == (3, 2, 12, 32)
    assert everywhere.ids.shape == (3, 2, 12, 20)
    for all_of_it, part in zip(everywhere, some, strict=True):
        np.testing.assert_array_equal(part, all_of_it[:, :, [7, 2]])
    for layer, block in variables["blocks"].items():
        ids = encode(CODED, block["code"], np.asarray(everywhere.x[layer])).ids.reshape(2, 12, -1)
        # float32 may see a tie otherwise than float64
        same = np.sort(ids[..., :4], -1) == np.sort(everywhere.ids[layer][..., :4], -1)
        assert same.mean() > 0.95
    dense = dataclasses.replace(CODED, levels=())
    assert tapped_losses(dense)(random_variables(dense), TOKENS, targets, jnp.arange(12))[1] is None


def test_initial_values():
    config = dataclasses.replace(
        CODED, d_model=64, mlp_dim=256, num_layers=8, levels=parse_levels("6,4,0")
    )
    params = init_variables(config, jax.random.key(0))[0]
    for block in params["blocks"].values():
        assert block["attn"].keys() == {"query", "key", "value", "out"}
        assert block["code"].keys() == {"bias"}
        for name, matrix in {**block["attn"], **block["mlp"]}.items():
            std = 0.02 / 4 if name in ("out", "down") else 0.02
            assert np.std(matrix) == pytest.approx(std, rel=0.05)
        assert np.all(block["attn_norm"] == 1) and np.all(block["mlp_norm"] == 1)
        assert not np.any(block["code"]["bias"])
    assert np.std(params["embed"]["table"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["positions"]["table"]) == pytest.approx(0.02, rel=0.1)
    matrices = [params["blocks"][i]["attn"]["out"] for i in (0, 1)]
    assert np.any(matrices[0] != matrices[1])


def test_positions_of_the_sample():
    key = jax.random.key(0)
    one, again, later = (
        sample_positions(key, jnp.int32(step), 64, 100).tolist() for step in (1, 1, 2)
    )
    assert one == again and set(one) != set(later)
    assert len(one) == len(set(one)) == 11 and set(one) <= set(range(64))
    assert set(sample_positions(key, jnp.int32(0), 64, 4).tolist()) == set(range(64))
    assert sample_positions(key, jnp.int32(0), 1024, 1536).shape == (1,)
