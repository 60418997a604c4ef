"""The golf recipes: their published sizes, the program that they trace to at full width, and their first training steps."""

import dataclasses
import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.config import Config
from sngpt_jax.optim.schedules import StepControls
from sngpt_jax.parallel import batch_placer, make_mesh
from sngpt_jax.plan import abstract_params, make_plan
from sngpt_jax.recipe import load
from sngpt_jax.step import init_state, losses, make_train_step

PUBLISHED = {  # parameters; measured TFLOP/s of a GPU and M tok/s of a GPU, whose quotient is M FLOPs a token
    "golf_baseline": (17_059_912, None),
    "golf_11l_xsa4": (25_388_121, 190 / (6.91 / 8)),
    "golf_10l_int5mlp": (24_730_705, 204 / (7.86 / 8)),
    "golf_12l_recycled": (29_406_940, 258 / (7.14 / 8)),
    "golf_9l_xsa_ngram": (17_650_248, 180 / (9.04 / 8)),
}
GOLF = [name for name in PUBLISHED if name != "golf_baseline"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    parameters, mflops = PUBLISHED[name]
    plan = make_plan(load(name))
    assert plan["parameters"]["total"] == parameters
    if mflops:
        assert plan["flops_per_token"]["train"] / 1e6 == pytest.approx(mflops, rel=0.01)


def changed(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@functools.cache
def gradient_program(name, T):
    """The traced loss and gradient of one full-width microbatch [2, T]."""
    config = changed(load(name), model={"compute_dtype": "bfloat16"})
    loss = jax.value_and_grad(lambda p, x, y: losses(config.model)(p, x, y).mean())
    tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
    return jax.make_jaxpr(loss)(abstract_params(config), tokens, tokens)


@pytest.mark.parametrize("name", GOLF)
def test_the_program_loops_over_no_tokens_and_repeats_no_constant(name):
    model, T = load(name).model, 2048
    program = gradient_program(name, T)
    found = list(equations(program.jaxpr))
    assert len(found) == len(list(equations(gradient_program(name, 256).jaxpr))), "the program grows with the sequence"
    assert not [e for e in found if e.primitive.name in ("scan", "while")]

    # lookups: the token embedding, the bigram and value tables; beside them one number for each target
    gathers = [e for e in found if e.primitive.name == "gather"]
    rows = [e for e in gathers if e.params["slice_sizes"][-1] > 1]
    assert len(rows) == 1 + bool(model.bigram_buckets) + bool(model.value_embed_layers)
    assert max(math.prod(e.outvars[0].aval.shape) for e in gathers) == 2 * T * model.d_model

    # the tables of rotary positions enter once, and the causal mask is made once
    large = [np.shape(c) for c in program.consts if np.size(c) > 1]
    assert sorted(large) == [(T, model.rotary_dims // 2)] * 2
    masks = [e for e in found if e.primitive.name == "ge" and e.outvars[0].aval.shape == (T, T)]
    assert len(masks) == 1
    assert not [e for e in found if e.primitive.name in ("cos", "sin")]


def few_steps(config: Config, steps: int) -> list[float]:
    """The losses of the first steps on random tokens that repeat, one device."""
    mesh = make_mesh(jax.devices()[:1])
    state, place, d = init_state(config, mesh), batch_placer(mesh, 1), config.data
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (d.batch_tokens // d.seq_len, d.seq_len + 1)).astype(np.uint16)
    batch = place({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
    seen = []

    def controls(late: bool) -> StepControls:
        return StepControls(np.float32(1), np.bool_(late), np.bool_(late))

    step = make_train_step(config, mesh).lower(state, batch, controls(False)).compile()
    for i in range(steps):
        state, metrics = step(state, batch, controls(i >= steps - 2))
        seen.append(float(metrics["loss"]))
    assert (state.swa is not None) == bool(config.optim.swa_every)
    assert state.swa is None or int(state.swa.count) == 2
    assert (state.ema is not None) == bool(config.optim.ema_decay)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((state.params, state.ema, state.swa)))
    return seen


@pytest.mark.parametrize("name", GOLF)
def test_a_shrunk_recipe_learns(name):
    recipe = load(name)
    width = recipe.model.d_model
    config = changed(
        recipe,
        model={
            "vocab_size": 64,
            "d_model": 32,
            "num_heads": 2,
            "num_kv_heads": 1,
            "mlp_dim": recipe.model.mlp_dim * 32 // width,
            "rope_dims": min(recipe.model.rope_dims, 4),
            "rope_ntk_len": min(recipe.model.rope_ntk_len, 8),
            "bigram_buckets": 32,
            "bigram_dim": 8,
            "value_embed_dim": 8,
        },
        optim={"qat_below": 0.2, "muon_momentum_warmup_steps": 2},
        data={"batch_tokens": 256, "seq_len": 16},
    )
    seen = few_steps(config, 8)
    assert seen[0] == pytest.approx(math.log(64), abs=0.05)
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLF)
def test_a_recipe_takes_its_first_steps_at_full_width(name):
    """With two of the five Newton–Schulz steps, in float32: at this batch they are nearly all of a CPU's work."""
    optim = {"newton_schulz_steps": 2, "newton_schulz_dtype": "float32"}
    seen = few_steps(changed(load(name), optim=optim, data={"batch_tokens": 512, "seq_len": 64}), 3)
    assert seen[0] == pytest.approx(math.log(1024), abs=0.1)
    assert seen[-1] < seen[0] - 0.3
