"""Fake quantization: the grid against numpy, and the switch inside a compiled program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax.cluster.mesh import path_name
from sngpt_jax.config import Config, ConfigError, ExportConfig, ModelConfig
from sngpt_jax.optim import qat

fake_quantize = jax.jit(qat.fake_quantize, static_argnums=(1, 2))


def numpy_scale(matrix, bits, floor):
    """The stored scales [..., 1, out] by the documented formula."""
    q_max = 2 ** (bits - 1) - 1
    absmax = np.abs(np.asarray(matrix)).max(-2, keepdims=True)
    reach = np.maximum(absmax, np.float32(floor))
    scale = np.maximum(reach * np.float32(1 / q_max), np.float32(2**-14))
    return scale.astype(np.float16).astype(np.float64)


def numpy_fake_quantize(matrix, bits, floor):
    """The grid's nearest matrix, and where a tie is so close that float32 may go the other way."""
    q_max = 2 ** (bits - 1) - 1
    scale = numpy_scale(matrix, bits, floor)
    quotient = np.asarray(matrix, np.float64) / scale
    near_tie = np.abs(np.abs(quotient - np.trunc(quotient)) - 0.5) < 1e-5
    return np.clip(np.rint(quotient), -q_max, q_max) * scale, near_tie


def random_matrix(seed, magnitude):
    """A stack of two, with channels of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = magnitude * 4.0 ** rng.uniform(-1, 1, size=(2, 1, 5))
    return jnp.asarray(sizes * rng.normal(size=(2, 150, 5)), jnp.float32)


cases = {
    "seed": st.integers(0, 10_000),
    # bits and least range: few programs
    "grid": st.sampled_from([(2, 0.0), (5, 0.0), (5, 1.0), (6, 31.0), (8, 0.0)]),
    "magnitude": st.sampled_from([1e-6, 1e-3, 0.1, 10.0]),
}


def assert_on_grid(result, matrix, bits, floor):
    """Returns the share of ties."""
    expected, near_tie = numpy_fake_quantize(matrix, bits, floor)
    np.testing.assert_array_equal(np.where(near_tie, 0, result), np.where(near_tie, 0, expected))
    return near_tie.mean()


@settings(max_examples=50)
@given(**cases)
def test_holds_for_every_matrix(seed, grid, magnitude):
    bits, floor = grid
    matrix = random_matrix(seed, magnitude)
    result = np.asarray(fake_quantize(matrix, bits, floor))
    assert result.dtype == np.float32
    assert assert_on_grid(result, matrix, bits, floor) < 0.05
    # idempotent
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(result), bits, floor), result)
    assert all(len(np.unique(channel)) <= 2**bits - 1 for one in result for channel in one.T)
    error = np.abs(result.astype(np.float64) - np.asarray(matrix, np.float64))
    assert (error <= numpy_scale(matrix, bits, floor) / 2 * (1 + 1e-6)).all()
    np.testing.assert_array_equal(fake_quantize(-matrix, bits, floor), -result)  # symmetric


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 8])
def test_a_matrix_on_a_grid_of_powers_of_two_is_left_alone(bits):
    q_max = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(-q_max, q_max + 1, size=(40, 5))
    codes[0] = q_max
    matrix = np.float32(codes * 2.0 ** np.array([-14, -8, -1, 0, 6]))
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(matrix), bits, 0.0), matrix)


def test_a_worked_example():
    """q_max is 3; halves go to the even code."""
    matrix = jnp.asarray([[3.0, 0.75], [1.4, -0.3], [1.5, 0.0], [2.5, 0.125], [-0.6, 0.374]])
    expected = [[3.0, 0.75], [1.0, -0.25], [2.0, 0.0], [2.0, 0.0], [-1.0, 0.25]]
    np.testing.assert_array_equal(qat.fake_quantize(matrix, 3, 0.0), expected)


def test_zero_channels_and_vanishing_ones_stay_finite():
    matrix = np.zeros((8, 3), np.float32)
    matrix[0, 1] = 1e-30
    matrix[0, 2] = 1.0
    result = fake_quantize(jnp.asarray(matrix), 5, 0.0)
    np.testing.assert_array_equal(result[:, :2], 0)
    np.testing.assert_allclose(result[0, 2], 1.0, rtol=1e-3)


def test_the_scale_is_half_precision():
    """1 / 15 is no float16: what comes back is 15 times the nearest one."""
    result = fake_quantize(jnp.ones((1, 1)), 5, 0.0)
    assert float(result[0, 0]) == 15 * float(np.float16(1 / 15)) != 1.0


# ------------------------------------------------------------ a tree of parameters

BLOCK = {
    "attn": {
        "query": (8, 8),
        "key": (8, 4),
        "value": (8, 4),
        "out": (8, 8),
        "q_gain": (2,),
        "gate_weight": (8, 2),
    },
    "mlp": {"up": (8, 12), "down": (12, 8)},
    "resid_mix": (2, 8),
}
SHAPES = {
    "embed": {"table": (20, 8)},
    "bigram": {"table": (9, 6), "proj": (6, 8), "scale": ()},
    "value_embed": {"table": (20, 6), "proj": (6, 4), "scale": (), "layer_scale": (2,)},
    "blocks": {"11": BLOCK},
    "recycle": {"scale": (2, 8), "bias": (2, 8)},
    "skip_weights": (1, 8),
    "smear": {"gate": (8,)},
}
MIXED = ExportConfig(mlp_bits=5, attention_bits=6, projection_bits=8, clip_floor=0.05)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def config_of(export, num_layers=12):
    return Config(ModelConfig(num_layers=num_layers), export=export)


def by_path(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def moved(export, num_layers=12):
    """The names of the parameters that `on_grid` changes, and its results by name."""
    params = by_path(parameters())
    result = by_path(jax.jit(lambda p: qat.on_grid(p, config_of(export, num_layers)))(parameters()))
    return {name for name in params if not np.array_equal(params[name], result[name])}, result


BLOCK_MATRICES = {"attn": ("query", "key", "value", "out"), "mlp": ("up", "down")}
PROJECTIONS = {"bigram/proj", "value_embed/proj"}


def matrices_of(part):
    return {f"blocks/11/{part}/{name}" for name in BLOCK_MATRICES[part]}


@pytest.mark.parametrize(
    "export", [MIXED, ExportConfig(mlp_bits=16, attention_bits=2, projection_bits=16)]
)
def test_every_matrix_has_the_grid_of_its_kind_and_nothing_else_changes(export):
    names = dict.fromkeys(PROJECTIONS, export.projection_bits)
    names |= dict.fromkeys(matrices_of("mlp"), export.mlp_bits)
    names |= dict.fromkeys(matrices_of("attn"), export.attention_bits)
    bits = {name: count for name, count in names.items() if count != 16}
    changed, result = moved(export)
    assert changed == bits.keys()
    for name in changed:
        assert_on_grid(result[name], by_path(parameters())[name], bits[name], export.clip_floor)


NO_GRID = ExportConfig(mlp_bits=16, attention_bits=16, projection_bits=16)


def test_no_grid_at_all_is_the_identity():
    assert moved(NO_GRID)[0] == set()


def test_what_the_exporter_keeps_in_half_precision_is_left_alone():
    """Key, value and projections are small enough to pass. The last layer's key is a late one."""
    changed, _ = moved(dataclasses.replace(MIXED, passthrough_size=48))
    names = ("attn/query", "attn/out", "mlp/up", "mlp/down")
    assert changed == {f"blocks/11/{name}" for name in names}
    late = dataclasses.replace(MIXED, late_key_layers=1)
    everything = matrices_of("attn") | matrices_of("mlp") | PROJECTIONS
    assert moved(late)[0] == everything - {"blocks/11/attn/key"}
    assert moved(late, num_layers=13)[0] == everything


@pytest.mark.parametrize(
    ("export", "said"),
    [
        (NO_GRID, "has no grid to train for"),
        (ExportConfig(passthrough_size=1000), "has no grid to train for"),
        (dataclasses.replace(MIXED, clip="sd"), "imitates ranges near a row's largest magnitude"),
        (dataclasses.replace(MIXED, gptq=True), "imitates ranges near a row's largest magnitude"),
    ],
)
def test_a_run_that_would_imitate_nothing_is_refused(export, said):
    with pytest.raises(ConfigError, match=said):
        qat.check(jax.eval_shape(parameters), config_of(export))
    qat.check(jax.eval_shape(parameters), config_of(dataclasses.replace(MIXED, clip="search")))


def test_the_switch_chooses_to_the_last_bit():
    params = parameters()
    params["blocks"]["11"]["mlp"]["up"] = params["blocks"]["11"]["mlp"]["up"].at[0].set(-0.0)
    call = jax.jit(lambda p, on: qat.straight_through(p, config_of(MIXED), on))
    on_grid = jax.jit(lambda p: qat.on_grid(p, config_of(MIXED)))(params)
    for on, expected in ((False, params), (True, on_grid)):
        for name, value in by_path(call(params, np.bool_(on))).items():
            wanted = np.asarray(by_path(expected)[name])
            assert np.asarray(value).tobytes() == wanted.tobytes(), name


def test_the_gradient_passes_as_if_there_were_no_grid():
    """Of f(w) = sum(c w²): 2 c v at the values v that f has seen, for every parameter."""
    params, c = parameters(), parameters(1)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_seen(p, on):
        seen = qat.straight_through(p, config_of(MIXED), on)
        terms = jax.tree.map(lambda a, b: jnp.sum(a * b**2), c, seen)
        return sum(jax.tree.leaves(terms)), seen

    for on in (False, True):
        gradient, seen = map(by_path, gradient_and_seen(params, np.bool_(on)))
        for name, factor in by_path(c).items():
            expected = 2 * np.asarray(factor) * seen[name]
            np.testing.assert_allclose(gradient[name], expected, rtol=1e-6, err_msg=name)


def test_switching_compiles_nothing_and_changes_the_loss():
    params, x = parameters(), jnp.asarray(np.random.default_rng(2).normal(size=(5, 8)), jnp.float32)

    @jax.jit
    def loss(p, switch):
        block = qat.straight_through(p, config_of(MIXED), switch)["blocks"]["11"]["mlp"]
        return jnp.mean(jnp.square(x @ block["up"] @ block["down"]))

    off, on = float(loss(params, np.bool_(False))), float(loss(params, np.bool_(True)))
    assert loss._cache_size() == 1
    assert 1e-5 < abs(on - off) / off < 0.1
    program = loss.lower(params, np.bool_(False)).compile().as_text()
    assert "round-nearest-even" in program and "reduce-precision" in program
