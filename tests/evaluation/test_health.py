"""The health of sparse codes: sums against float64 loops over tokens, shares at their thresholds,
devices, partial batches.
"""

import dataclasses
import functools
import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sngpt_kernels.cayley import dictionary

from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, parse_levels
from sngpt_jax.evaluation.health import (
    NOTHING,
    Health,
    Sums,
    accumulate,
    layer_sums,
    make_health_step,
    score_health,
    summarize,
)
from sngpt_jax.model.cayley import CodeState, Taps, code_state
from sngpt_jax.model.forward import init_variables, join, tapped_losses
from sngpt_jax.run.metrics import MetricsWriter
from tests.evaluation.test_windows import Stream

MODEL = ModelConfig(
    family="pre_norm",
    vocab_size=61,
    num_layers=2,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    mlp_dim=32,
    max_seq_len=8,
    levels=parse_levels("4,4,0;6,6,8;8,5,16"),
    positions="learned",
    compute_dtype="float32",
)
LEVELS = MODEL.levels
D, F, T = 16, 256, 8
RANGES = [(0, 16), (16, 64), (64, 256)]
COLUMNS = [slice(0, 4), slice(4, 10), slice(10, 15)]


def random_code(rng, *shape):
    return CodeState(
        mean=rng.normal(0, 0.3, (*shape, D)).astype(np.float32),
        std=rng.uniform(0.5, 3, (*shape, F)).astype(np.float32),
        bias=rng.normal(0, 0.5, (*shape, F)).astype(np.float32),
        last_fired=np.zeros((*shape, F), np.int32),
    )


def random_ids(rng, tokens):
    """Distinct features of each level, parents and children as they fall."""
    levels = [(np.arange(*ids), k) for ids, (_, k, _) in zip(RANGES, LEVELS, strict=True)]
    rows = ([rng.choice(ids, k, replace=False) for ids, k in levels] for _ in range(tokens))
    return np.array([np.concatenate(row) for row in rows], np.int32)


def child_set(parent, level, generators):
    """The children of a parent by their definition."""
    below, (n, _, degree) = LEVELS[level - 1][0], LEVELS[level]
    elements = {0}
    for b in dictionary.child_generators(below, n, degree, generators):
        elements |= {u ^ b for u in elements}
    return {int(parent) ^ u for u in elements if u >> below}


def oracle(x_ND, ids_NA, code, config=MODEL):
    """One layer's sums and its duplicate candidates, one token at a time."""
    x_ND, mean, std, bias = (np.asarray(a, np.float64) for a in (x_ND, *code[:3]))
    counts, activations, z_min = np.zeros(F, int), np.zeros(F), np.full(3, np.inf)
    cos = centered = mean_square = 0.0
    duplicates = np.zeros(3)
    for x, ids in zip(x_ND, ids_NA, strict=True):
        x_hat = np.zeros(D)
        for level, columns in enumerate(COLUMNS):
            for f in ids[columns]:
                v = dictionary.atoms(f, D)
                score = v @ (x - mean)
                z = score / max(std[f], 1e-3)
                c = max((z if config.forward_standardized else score) + bias[f], 0)
                counts[f] += 1
                activations[f] += c
                z_min[level] = min(z_min[level], z)
                x_hat += c * v
            if level:
                parents = ids[COLUMNS[level - 1]]
                candidates = [child_set(f, level, config.generators) for f in parents]
                duplicates[level] += sum(map(len, candidates)) - len(set().union(*candidates))
        if np.any(x) and np.any(x_hat):
            cos += x @ x_hat / np.linalg.norm(x) / np.linalg.norm(x_hat)
        if np.any(x != mean) and np.any(x_hat):
            centered += (x - mean) @ x_hat / np.linalg.norm(x - mean) / np.linalg.norm(x_hat)
        mean_square += np.mean(x_hat**2)
    return counts, activations, z_min, (cos, centered), mean_square, duplicates


def check(sums, health, layer, expected, tokens, generators="spread"):
    counts, activations, z_min, cosines, mean_square, duplicates = expected
    assert int(sums.tokens[layer]) == tokens
    np.testing.assert_array_equal(sums.counts[layer], counts)
    np.testing.assert_allclose(sums.activations[layer], activations, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(sums.min_z[layer], z_min, rtol=1e-4, atol=1e-4)
    assert generators == "prefix" or duplicates[1:].all()  # else the comparison shows nothing
    np.testing.assert_allclose(health.duplicates[layer], duplicates / tokens, rtol=1e-12)
    found = [health.cos[layer], health.cos_centered[layer]]
    np.testing.assert_allclose(found, np.array(cosines) / tokens, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(health.rms[layer], math.sqrt(mean_square / tokens), rtol=1e-4)


# ----------------------------------------------------------------------------------- on the devices


@pytest.mark.parametrize(
    ("standardized", "generators", "dtype"),
    [(True, "spread", "float32"), (False, "prefix", "float32"), (False, "spread", "bfloat16")],
)
def test_one_layers_sums_are_those_of_a_loop_over_tokens(standardized, generators, dtype):
    config = dataclasses.replace(MODEL, forward_standardized=standardized, generators=generators)
    rng = np.random.default_rng(0)
    code = random_code(rng)
    x_BPD = np.array(jnp.asarray(rng.normal(0, 1, (5, 6, D)), dtype))
    x_BPD[0, 0] = 0
    ids_BPA = random_ids(rng, 30).reshape(5, 6, -1)
    counted = np.array([True, False, True, True, False])
    code.std[3] = 0  # divided by 1e-3
    code.bias[ids_BPA[2, 3]] = -1e6  # nothing is active there
    taps = Taps(jnp.asarray(x_BPD), jnp.asarray(ids_BPA))
    sums = jax.jit(functools.partial(layer_sums, config))(
        taps, jax.tree.map(jnp.asarray, code), jnp.asarray(counted)
    )
    sums = accumulate(NOTHING, jax.tree.map(lambda a: a[None], sums))
    health = summarize(config, CodeState(*(a[None] for a in code)), sums, 1)
    expected = oracle(x_BPD[counted].reshape(-1, D), ids_BPA[counted].reshape(-1, 15), code, config)
    check(sums, health, 0, expected, 18, generators)


@functools.cache
def random_model():
    """Variables of a model whose codes are no longer those of the start."""
    rng = np.random.default_rng(2)
    variables = jax.jit(lambda key: join(*init_variables(MODEL, key)))(jax.random.key(3))
    for block in variables["blocks"].values():
        fired = rng.integers(0, 300, F).astype(np.int32)
        code = random_code(rng)._replace(last_fired=fired)._asdict()
        block["code"] = jax.tree.map(jnp.asarray, code)
    return variables


@functools.cache
def health_step(devices):
    mesh = make_mesh(jax.devices()[:devices])
    return mesh, make_health_step(MODEL, mesh)


def test_a_models_sums_are_those_of_its_taps():
    mesh, step = health_step(1)
    variables = random_model()
    tokens = np.random.default_rng(4).integers(0, 61, (4, T + 1)).astype(np.uint16)
    counted = np.array([True, True, False, True])
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "counted": counted}
    sums = accumulate(NOTHING, step(variables, batch_placer(mesh)(batch)))
    _, taps = jax.jit(tapped_losses(MODEL))(variables, tokens[:, :-1], tokens[:, 1:], jnp.arange(T))
    code = code_state(variables)
    health = summarize(MODEL, code, sums, 300)
    for layer in range(MODEL.num_layers):
        x, ids = (np.asarray(a[layer])[counted].reshape(-1, a.shape[-1]) for a in taps)
        check(sums, health, layer, oracle(x, ids, CodeState(*(a[layer] for a in code))), 3 * T)


# -------------------------------------------------------------------------------------- on the host


def host_sums(tokens, counts, activations=None, repeats=(0, 0, 0)):
    """One layer's sums by hand; the default mean activation is 1."""
    return Sums(
        tokens=np.array([tokens]),
        counts=np.asarray(counts)[None],
        activations=np.asarray(counts if activations is None else activations, float)[None],
        min_z=np.array([[-1.5, 0.25, 2.0]]),
        repeats=np.array([repeats]),
        cos=np.array([tokens * 0.75]),
        cos_centered=np.array([tokens * 0.5]),
        mean_square=np.array([tokens * 2.25]),
    )


def fresh_code(last_fired=None):
    zeros = np.zeros((1, F), np.float32)
    fired = zeros.astype(np.int32) if last_fired is None else last_fired[None].astype(np.int32)
    return CodeState(mean=np.zeros((1, D), np.float32), std=zeros + 1, bias=zeros, last_fired=fired)


def health_of(sums, step=1, code=None):
    return summarize(MODEL, code or fresh_code(), sums, step)


def test_a_feature_at_a_tenth_of_an_even_spread_is_alive():
    # 400 tokens: a tenth of 400·4/16, 400·6/48 and 400·5/192 is 10, 5 and 1.04
    counts = np.full(F, 100)
    counts[:4] = [0, 9, 10, 11]
    counts[16:19] = [4, 5, 6]
    counts[64:68] = [0, 1, 2, 3]
    dead = health_of(host_sums(400, counts)).dead
    np.testing.assert_allclose(dead, [[2 / 16, 1 / 48, 2 / 192]])


@given(tokens=st.integers(1, 10**6), count=st.integers(0, 10**5))
def test_the_threshold_is_exact(tokens, count):
    dead = health_of(host_sums(tokens, np.full(F, count))).dead
    expected = [count < Fraction(tokens * k, 10 * size) for k, size in ((4, 16), (6, 48), (5, 192))]
    assert dead.tolist() == [expected]


def test_a_zombie_is_alive_and_below_a_tenth_of_the_median_of_those_alive():
    counts = np.full(F, 100)
    strength = np.full(F, 2.0)
    strength[:3] = [0.0, 0.199, 0.2]  # the third is at the threshold
    strength[16:64] = 0  # a level whose median is 0
    # dead, so neither zombies nor in the median
    counts[64 : 64 + 100], strength[64 : 64 + 100] = 1, 0.001
    strength[64 + 100] = 0.1
    health = health_of(host_sums(400 * 100, counts, counts * strength))
    # all too seldom for so many tokens
    assert health.dead.tolist() == [[1, 1, 1]] and not health.zombies.any()
    health = health_of(host_sums(400, counts, counts * strength))
    np.testing.assert_allclose(health.dead, [[0, 0, 100 / 192]])
    np.testing.assert_allclose(health.zombies, [[2 / 16, 0, 1 / 192]])


@pytest.mark.parametrize(
    ("step", "last_fired", "silent"),
    [
        (250, [0, 1, 149, 150, 151, 250], 4),  # the last 100 steps are 151 … 250
        (101, [0, 1, 2, 3, 100, 101], 2),
        (100, [0, 1, 2, 50, 99, 100], 1),
        (7, [0, 0, 0, 1, 2, 7], 3),  # of all seven
    ],
)
def test_silent_features_did_not_fire_in_the_last_100_steps(step, last_fired, silent):
    fired = np.full(F, step)
    fired[64:70] = last_fired
    health = health_of(host_sums(1, np.ones(F)), step, fresh_code(fired))
    np.testing.assert_allclose(health.silent, [[0, 0, silent / 192]])


def test_before_the_first_step_nothing_can_be_silent():
    assert np.isnan(health_of(host_sums(1, np.ones(F)), 0).silent).all()


def test_statistics_by_level():
    code = random_code(np.random.default_rng(5), 1)
    health = health_of(host_sums(50, np.ones(F), repeats=(0, 25, 10)), code=code)
    scores = dictionary.atoms(np.arange(F), D) @ code.mean[0].astype(np.float64)
    slices = [slice(*ids) for ids in RANGES]
    means = [np.abs(scores[V]).mean() for V in slices]
    np.testing.assert_allclose(health.mu_mean[0], means, rtol=1e-5)
    # why not the plain mean: it is one coordinate of the mean, the same at every level
    np.testing.assert_allclose([scores[V].mean() for V in slices], code.mean[0, 0] / 4, rtol=1e-6)
    spread = [code.std[0, V].mean() for V in slices]
    np.testing.assert_allclose(health.sigma_mean[0], spread, rtol=1e-6)
    parents = (range(*ids) for ids in RANGES)
    children = [
        {child for f in level for child in child_set(f, i, "spread")}
        for i, level in zip((1, 2), parents, strict=False)
    ]
    np.testing.assert_array_equal(health.reachable[0], [16, *map(len, children)])
    np.testing.assert_allclose(health.duplicates[0], [0, 25 * 6 / 50, 10 * 12 / 50])
    assert health.min_z.tolist() == [[-1.5, 0.25, 2.0]]
    assert (health.tokens, health.cos.tolist(), health.rms.tolist()) == (50, [0.75], [1.5])
    assert health.cos_centered.tolist() == [0.5]


def test_sums_of_batches_add_up_without_rounding_to_float32():
    big = host_sums(2**31 - 1, np.full(F, 2**31 - 1), np.full(F, 2.0**24))
    narrow = Sums(*(a.astype(np.int32 if a.dtype.kind == "i" else np.float32) for a in big))
    low = narrow._replace(min_z=np.array([[-2.0, 3.0, 2.0]]))
    ones = narrow._replace(activations=np.ones((1, F), np.float32))
    total = functools.reduce(accumulate, (narrow, low, ones), NOTHING)
    assert total.tokens[0] == total.counts[0, 7] == 3 * (2**31 - 1)
    assert total.activations[0, 7] == 2**25 + 1
    assert total.min_z.tolist() == [[-2.0, 0.25, 2.0]]


# ----------------------------------------------------------------------------------- what is logged


STATISTICS = ("reachable", "mu_mean", "sigma_mean", "min_z", "duplicates")
PER_LEVEL = ("dead", "silent", "zombies", *STATISTICS)


def by_hand(**changes):
    """The health of 2 layers with 3 levels."""
    shares = {
        "dead": np.array([[0, 0.002, 0.02], [0, 0.004, 0.022]]),
        "silent": np.array([[0, 0.0002, 0.004]] * 2),
        "zombies": np.array([[0, 0, 1.0]] * 2),
    }
    layers = {
        "cos": np.array([0.8, 0.86]),
        "cos_centered": np.array([0.9, 0.92]),
        "rms": np.array([1.0, 2.0]),
    }
    zeros = dict.fromkeys(PER_LEVEL, np.zeros((2, 3)))
    return Health(tokens=40, **(zeros | shares | layers | changes))


def test_the_record_has_every_layer_and_level_and_their_means():
    record = by_hand().record()
    names = [f"level{level}/{name}" for level in range(3) for name in PER_LEVEL]
    names += ["cos", "cos_centered", "rms"]
    places = ("", "layer00/", "layer01/")
    expected = {f"code/{place}{name}" for place in places for name in names}
    assert set(record) == expected | {"code/tokens"}
    assert all(type(value) in (int, float) for value in record.values())
    assert (record["code/layer00/level2/dead"], record["code/layer01/level1/dead"]) == (0.02, 0.004)
    assert record["code/level2/dead"] == pytest.approx(0.021)
    assert (record["code/layer01/cos"], record["code/rms"]) == (0.86, 1.5)
    assert record["code/tokens"] == 40


def test_the_line_is_short_and_no_share_above_zero_reads_as_zero():
    shares = "dead 0.0/0.3/2.1 % │ silent 0.0/<0.1/0.4 % │ zombies 0.0/0.0/100.0 %"
    assert by_hand().line() == f"code │ {shares} │ cos 0.83, 0.91 centered"


def test_numbers_that_are_not_finite_break_nothing(tmp_path):
    health = by_hand(
        silent=np.full((2, 3), np.nan), min_z=np.full((2, 3), np.inf), cos=np.array([np.nan, 1])
    )
    assert health.line().startswith("code │ dead 0.0/0.3/2.1 % │ silent –/–/– % │")
    with MetricsWriter(tmp_path, resume_step=None) as writer:
        writer.write({"step": 3, **health.record()})
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written["code/level0/silent"] is None and written["code/layer01/level2/dead"] == 0.022
    nan = host_sums(400, np.full(F, 100), np.full(F, np.nan))
    assert health_of(nan).zombies.tolist() == [[0, 0, 0]]


# ------------------------------------------------------------------------------------ over a stream


def scored(step, mesh, length, health_tokens, progress=None):
    """The health of `random_model` after 200 steps."""
    config = Config(
        model=MODEL,
        data=DataConfig(seq_len=T, batch_tokens=64, slices=1),
        eval=EvalConfig(health_tokens=health_tokens, device_batch_tokens=4 * T),
    )
    arguments = config, random_model(), step, Stream(length, 61), mesh
    return score_health(*arguments, step=200, progress=progress)


@pytest.mark.parametrize(
    ("health_tokens", "devices", "windows"),
    [(1, 1, 1), (T, 8, 1), (5 * T, 1, 5), (7 * T - 1, 1, 6), (19 * T, 8, 19), (10**6, 8, 124)],
)
def test_every_window_of_the_start_counts_once(health_tokens, devices, windows):
    """A step that "selects" the inputs that count and adds up the targets over them."""
    seen, progress = [], []

    def step(variables, batch):
        counted = np.asarray(batch["counted"])
        assert len(counted) % devices == 0
        inputs, targets = (
            np.asarray(batch[name])[counted].reshape(-1) for name in ("inputs", "targets")
        )
        counts, weighted = (np.bincount(inputs, w, minlength=F) for w in (None, targets))
        sums = host_sums(inputs.size, counts, weighted)
        seen.append(Sums(*(np.repeat(a, 2, axis=0) for a in sums)))
        return seen[-1]

    mesh = make_mesh(jax.devices()[:devices])
    health = scored(step, mesh, 1000, health_tokens, lambda *counts: progress.append(counts))
    total = functools.reduce(accumulate, seen, NOTHING)
    tokens = Stream(1000, 61).take(0, windows * T + 1)
    assert health.tokens == windows * T
    np.testing.assert_array_equal(total.counts[1], np.bincount(tokens[:-1], minlength=F))
    weighted = np.bincount(tokens[:-1], tokens[1:], minlength=F)
    np.testing.assert_array_equal(total.activations[1], weighted)
    assert progress[-1] == (windows, windows)
    assert len(progress) == len(seen) == math.ceil(windows / (4 * devices))


def test_devices_and_batches_change_nothing():
    """Eleven windows: in batches of four on one device, and in one of sixteen on eight."""
    (mesh, step), (mesh_of_8, step_of_8) = health_step(1), health_step(8)
    one = scored(step, mesh, 200, 11 * T).record()
    eight = scored(step_of_8, mesh_of_8, 200, 11 * T).record()
    assert one["code/tokens"] == eight["code/tokens"] == 88
    assert 0 < one["code/level2/dead"] < 1 and 0 < one["code/level2/silent"] < 1
    assert one == pytest.approx(eight, rel=1e-4, abs=1e-6)
