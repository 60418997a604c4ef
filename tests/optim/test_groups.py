"""Groups: membership by path, the printed table, and training trajectories against float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sngpt_jax.config import OptimConfig
from sngpt_jax.config.recipe import load
from sngpt_jax.optim import groups

L, D, F, KV, V, H, BUCKETS, DIM = 2, 16, 32, 8, 20, 2, 10, 6


def block():
    return {
        "attn": {"query": (D, D), "key": (D, KV), "value": (D, KV), "out": (D, D), "q_gain": (H,)},
        "mlp": {"up": (D, F), "down": (F, D)},
        "attn_scale": (D,),
        "mlp_scale": (D,),
        "resid_mix": (2, D),
    }


def shapes(key=str, layers=L):
    return {
        "embed": {"table": (V, D)},
        "blocks": {key(i): block() for i in range(layers)},
        "skip_weights": (layers // 2, D),
    }


def every_shape():
    """A model of one layer with every parameter that there can be."""
    tree = shapes(layers=1)
    tree["blocks"]["0"]["attn"] |= {"gate_weight": (D, H), "gate_bias": (H,), "value_mix": (2,)}
    tree["blocks"]["0"] |= {"attn_norm": (D,), "mlp_norm": (D,), "code": {"bias": (64,)}}
    return tree | {
        "positions": {"table": (8, D)},
        "final_norm": (D,),
        "bigram": {"table": (BUCKETS, DIM), "proj": (DIM, D), "scale": ()},
        "value_embed": {"table": (V, DIM), "proj": (DIM, KV), "scale": (), "layer_scale": (2,)},
        "recycle": {"scale": (2, D), "bias": (2, D)},
        "smear": {"gate": (D,)},
        "skip_weights": (3, D),
    }


MEMBERS = {
    "embed": ["embed/table", "positions/table"],
    "table": ["bigram/table", "value_embed/table"],
    "matrix": (
        [f"blocks/0/attn/{name}" for name in ("query", "key", "value", "out")]
        + ["blocks/0/mlp/up", "blocks/0/mlp/down"]
    ),
    "projection": ["bigram/proj", "value_embed/proj"],
    "scalar": (
        [f"blocks/0/attn/{name}" for name in ("q_gain", "gate_weight", "gate_bias", "value_mix")]
        + [f"blocks/0/{name}" for name in ("attn_scale", "mlp_scale", "resid_mix")]
        + [
            "bigram/scale",
            "value_embed/scale",
            "value_embed/layer_scale",
            "recycle/scale",
            "recycle/bias",
        ]
        + ["smear/gate", "skip_weights"]
        + ["blocks/0/attn_norm", "blocks/0/mlp_norm", "final_norm"]
    ),
    "code_bias": ["blocks/0/code/bias"],
}


def of_shapes(function, tree):
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, tuple))


def as_abstract(tree):
    return of_shapes(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree)


def abstract(**kwargs):
    return as_abstract(shapes(**kwargs))


def random(seed, tree, scale=1.0):
    rng = np.random.default_rng(seed)
    return of_shapes(lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32), tree)


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {groups.path_name(path): leaf for path, leaf in leaves}


def test_every_parameter_of_every_technique_has_its_group():
    expected = {name: group for group, names in MEMBERS.items() for name in names}
    assert by_path(groups.label(as_abstract(every_shape()))) == expected


@pytest.mark.parametrize(
    "name", ["blocks/0/attn/query/extra", "xembed/table", "embed/table2", "head", "blocks/x/mlp/up"]
)
def test_a_parameter_without_a_rule_is_named(name):
    params = jnp.zeros((2, 2))
    for part in reversed(name.split("/")):
        params = {part: params}
    for call in (groups.make_optimizer, groups.describe):
        with pytest.raises(ValueError, match=rf"tensor {name} has no row"):
            call(OptimConfig(), params)


def test_a_rule_for_muon_that_meets_no_matrix_is_an_error():
    params = {"blocks": {"0": {"mlp": {"up": jnp.zeros((2, 3, 4))}}}}
    with pytest.raises(ValueError, match="blocks/0/mlp/up"):
        groups.make_optimizer(OptimConfig(), params).init(params)


# ------------------------------------------------------------------------------ trajectories

CONFIG = OptimConfig(
    muon_lr=0.03,
    embed_lr=0.05,
    table_lr=0.04,
    scalar_lr=0.02,
    muon_weight_decay=0.1,
    adam_weight_decay=0.2,
    muon_momentum=0.95,
    muon_momentum_start=0.85,
    muon_momentum_warmup_steps=2,
    newton_schulz_steps=2,
    newton_schulz_dtype="float32",
    adam_b1=0.9,
    adam_b2=0.95,
    adam_eps=1e-3,
    grad_clip=5.0,
)
MULTIPLIERS, ADAM_MULTIPLIERS = (1.0, 0.5, 0.25), (0.75, 0.125, 1.0)
GRAD_SCALES = (1.0, 0.01, 1.0)  # clipped (norm about 57), left alone, clipped


def numpy_trajectory(config, params, grads_of_step, multipliers, adam_multipliers):
    """The documented rules, written out in float64."""
    adam, decay_muon, decay_adam = "adam", config.muon_weight_decay, config.adam_weight_decay
    settings = {
        "embed": (adam, config.embed_lr, decay_adam),
        "table": (adam, config.table_lr, decay_adam),
        "matrix": ("muon", config.muon_lr, decay_muon),
        "projection": ("muon", config.muon_lr, decay_muon),
        "scalar": (adam, config.scalar_lr, decay_adam),
        "code_bias": (adam, config.scalar_lr, 0.0),
    }
    if config.projection_rule == adam:
        settings["projection"] = settings["scalar"]
    clips = config.grad_clip and config.grad_clip_scope == "global"
    setting_of = {name: settings[group] for group, names in MEMBERS.items() for name in names}
    w = {name: np.asarray(p, np.float64) for name, p in by_path(params).items()}
    m = {name: np.zeros_like(p) for name, p in w.items()}
    v = {name: np.zeros_like(p) for name, p in w.items()}
    rates = zip(multipliers, adam_multipliers, strict=True)
    for t, (multiplier, adam_multiplier) in enumerate(rates):
        g = {name: np.asarray(x, np.float64) for name, x in by_path(grads_of_step(t)).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        if clips and norm > config.grad_clip:
            g = {name: x * config.grad_clip / norm for name, x in g.items()}
        warmup = config.muon_momentum_warmup_steps
        share = min(t / warmup, 1.0) if warmup else 1.0
        mu = (1 - share) * config.muon_momentum_start + share * config.muon_momentum
        for name in w:
            rule, lr, decay = setting_of[name]
            if rule == "muon":
                m[name] = mu * m[name] + g[name]
                left, s, right = np.linalg.svd(g[name] + mu * m[name], full_matrices=False)
                s = s / (np.linalg.norm(s) + 1e-7)
                for _ in range(config.newton_schulz_steps):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                fan_in, fan_out = w[name].shape
                u = left * s @ right * math.sqrt(max(1.0, fan_out / fan_in))
            else:
                b1, b2 = config.adam_b1, config.adam_b2
                m[name] = b1 * m[name] + (1 - b1) * g[name]
                v[name] = b2 * v[name] + (1 - b2) * g[name] ** 2
                m_hat, v_hat = m[name] / (1 - b1 ** (t + 1)), v[name] / (1 - b2 ** (t + 1))
                u = m_hat / (np.sqrt(v_hat) + config.adam_eps)
            rate = lr * (multiplier if rule == "muon" else adam_multiplier)
            w[name] = (1 - rate * decay) * w[name] - rate * u
    return w


NO_EXTRAS = {
    "grad_clip": 0.0,
    "muon_momentum_warmup_steps": 0,
    "muon_weight_decay": 0.0,
    "adam_weight_decay": 0.0,
}
OTHER_RULES = {"projection_rule": "adam", "grad_clip_scope": "device"}


@pytest.mark.parametrize("changes", [{}, NO_EXTRAS, OTHER_RULES])
def test_three_steps_of_every_group(changes):
    config = dataclasses.replace(CONFIG, **changes)
    start = params = random(0, every_shape())

    def grads_of_step(t):
        return random(10 + t, every_shape(), GRAD_SCALES[t])

    optimizer = groups.make_optimizer(config, as_abstract(every_shape()))

    @jax.jit
    def step(params, state, grads, *multipliers):
        rates = dict(zip(("lr_multiplier", "adam_lr_multiplier"), multipliers, strict=True))
        updates, state = optimizer.update(grads, state, params, **rates)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for t, multipliers in enumerate(zip(MULTIPLIERS, ADAM_MULTIPLIERS, strict=True)):
        params, state = step(params, state, grads_of_step(t), *map(jnp.float32, multipliers))
    assert step._cache_size() == 1  # a new multiplier compiles nothing anew

    expected = numpy_trajectory(config, start, grads_of_step, MULTIPLIERS, ADAM_MULTIPLIERS)
    for name, actual in by_path(params).items():
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected[name], atol=2e-5, err_msg=name)


def test_clip():
    # norm sqrt(12 * 4 + 4 * 16) = sqrt(112)
    grads = {"a": jnp.full((3, 4), 2.0), "b": {"c": jnp.full((4,), 4.0)}}
    for max_norm in (0.0, 11.0):
        jax.tree.map(np.testing.assert_array_equal, groups.clip(grads, max_norm), grads)
    clipped = groups.clip(grads, 0.3)
    np.testing.assert_allclose(clipped["a"], 2 * 0.3 / math.sqrt(112), rtol=1e-6)
    np.testing.assert_allclose(clipped["b"]["c"], 4 * 0.3 / math.sqrt(112), rtol=1e-6)


def test_the_global_norm_takes_one_sum_per_shape():
    shapes = [(3, 4)] * 3 + [(4, 3), (4,), (4,)]
    draw = np.random.default_rng(0).standard_normal
    leaves = [draw(shape).astype(np.float32) for shape in shapes]
    exact = math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))
    np.testing.assert_allclose(groups.global_norm(leaves), exact, rtol=1e-6)
    assert not np.isfinite(groups.global_norm([*leaves, np.array([np.nan], np.float32)]))
    assert str(jax.make_jaxpr(groups.global_norm)(leaves)).count("reduce_sum") == 3


def test_a_group_without_members_keeps_no_state():
    state = groups.make_optimizer(CONFIG, abstract()).init(abstract())
    assert set(state[1].inner_states) == {"embed", "matrix", "scalar"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_momentum_of_both_muon_groups_has_the_dtype_asked_for(dtype):
    config = dataclasses.replace(CONFIG, muon_momentum_dtype=dtype)
    params = as_abstract(every_shape())
    state = jax.eval_shape(groups.make_optimizer(config, params).init, params)
    for group in ("matrix", "projection"):
        momentum = state[1].inner_states[group].inner_state[0].momentum
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(momentum)]
        assert dtypes == [jnp.dtype(dtype)] * len(MEMBERS[group])


def test_a_multiplier_of_zero_changes_nothing_but_the_state():
    small = {"embed": {"table": (V, D)}, "bigram": {"proj": (DIM, D)}}
    params, grads = random(0, small), random(1, small)
    optimizer = groups.make_optimizer(CONFIG, params)
    updates, state = jax.jit(optimizer.update)(
        grads, optimizer.init(params), params, lr_multiplier=0.0, adam_lr_multiplier=0.0
    )
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))


# ------------------------------------------------------------------------------ the table


# Rule, peak learning rate and decay of each group, as the authors' scripts and logs have them:
# (rule, lr, decay)
MUON_02, MUON_025 = ("muon", 0.02, 0.04), ("muon", 0.025, 0.04)
NAMES = ("embed", "table", "matrix", "projection", "scalar")
SYSTEMS = {
    name: dict(zip(NAMES, rows, strict=True))
    for name, rows in {
        "golf_11l_xsa4": (*[("adam", 0.035, 0.04)] * 2, MUON_025, MUON_025, ("adam", 0.025, 0.04)),
        "golf_10l_int5mlp": (*[("adam", 0.03, 0.01)] * 2, MUON_02, MUON_02, ("adam", 0.02, 0.01)),
        "golf_12l_recycled": (*[("adam", 0.035, 0.04)] * 2, MUON_025, *[("adam", 0.025, 0.04)] * 2),
        "golf_9l_xsa_ngram": (
            ("adam", 0.03, 0.0),
            ("adam", 0.02, 0.0),
            MUON_02,
            *[("adam", 0.02, 0.0)] * 2,
        ),
    }.items()
}


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_groups_of_the_published_systems(recipe):
    optim, expected = load(recipe).optim, SYSTEMS[recipe]
    rows = groups.describe(optim, as_abstract(every_shape()))
    expected = {**expected, "code_bias": (*expected["scalar"][:2], 0.0)}
    assert {row.path: (row.rule, row.lr, row.weight_decay) for row in rows} == {
        name.replace("blocks/0", "blocks/*"): expected[group]
        for group, names in MEMBERS.items()
        for name in names
    }
    assert list(dict.fromkeys(row.group for row in rows)) == list(expected)
    momentum = optim.muon_momentum_start, optim.muon_momentum, optim.muon_momentum_warmup_steps
    assert momentum == (0.92, 0.99, 1500)
    assert (optim.adam_b1, optim.adam_b2, optim.adam_eps, optim.grad_clip) == (0.9, 0.95, 1e-8, 0.3)


@pytest.mark.parametrize("key", [str, int])
def test_table_collapses_layers(key):
    rows = groups.describe(CONFIG, abstract(key=key, layers=11))
    for row in (
        groups.Row("blocks/*/mlp/up", (D, F), 11, "matrix", "muon", 0.03, 0.1),
        groups.Row("blocks/*/resid_mix", (2, D), 11, "scalar", "adam", 0.02, 0.2),
        groups.Row("embed/table", (V, D), 1, "embed", "adam", 0.05, 0.2),
    ):
        assert row in rows
    assert len(rows) == 12
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract(layers=11))]
    assert sum(row.parameters for row in rows) == sum(sizes)


def test_table_lists_layers_that_differ():
    params = abstract(layers=11)
    for layer in ("2", "10"):
        params["blocks"][layer]["mlp"]["up"] = jax.ShapeDtypeStruct((D, 2 * F), jnp.float32)
    rows = {row.path: row for row in groups.describe(CONFIG, params)}
    wide = rows["blocks/{2,10}/mlp/up"]
    assert (wide.shape, wide.count) == ((D, 2 * F), 2)
    assert rows["blocks/{0,1,3,4,5,6,7,8,9}/mlp/up"].count == 9


def test_printed_table():
    config = dataclasses.replace(CONFIG, scalar_lr=1e-5)
    blocks = {"0": {"mlp": block()["mlp"]}}
    params = {"embed": {"table": (V, D)}, "blocks": blocks, "skip_weights": (1000, D)}
    assert groups.format_table(groups.describe(config, as_abstract(params))).splitlines() == [
        "parameter          shape    tensors  parameters  group   rule     lr  decay",
        "embed/table        20×16          1         320  embed   adam   0.05    0.2",
        "blocks/*/mlp/down  32×16          1         512  matrix  muon   0.03    0.1",
        "blocks/*/mlp/up    16×32          1         512  matrix  muon   0.03    0.1",
        "skip_weights       1000×16        1      16,000  scalar  adam  1e-05    0.2",
        "total                             4      17,344",
    ]
