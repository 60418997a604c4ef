"""The golf recipes: published sizes, the program at full width, the first training steps."""

import functools
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, changed, flat
from sngpt_jax.config.recipe import load
from sngpt_jax.model.forward import abstract_parts, losses
from sngpt_jax.training.cost import make_plan
from sngpt_jax.training.state import Shapes
from sngpt_jax.training.step import all_finite
from tests.training.steps import begin, host_batch, take

# parameters; M FLOPs per token: the rate estimated for the submission's GPU over its speed
SIZES = {
    "golf_baseline": (17_059_912, None),
    "golf_11l_xsa4": (25_388_121, 190 / (6.91 / 8)),
    "golf_10l_int5mlp": (24_730_705, 204 / (7.86 / 8)),
    "golf_12l_recycled": (29_406_940, 258 / (7.14 / 8)),
    "golf_9l_xsa_ngram": (17_650_248, 180 / (9.04 / 8)),
}
GOLF = [name for name in SIZES if name != "golf_baseline"]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_submissions(name):
    parameters, mflops = SIZES[name]
    plan = make_plan(Shapes.of(load(name), make_mesh(jax.devices()[:1])))
    assert plan["parameters"]["total"] == parameters
    if mflops:
        assert plan["flops_per_token"]["train"] / 1e6 == pytest.approx(mflops, rel=0.01)


# What the submissions' descriptions and code say, beside the rates and decays that
# tests/optim/test_groups.py holds: one value for all of GOLF, or one for each
SETTINGS = {
    "model.num_layers": (11, 10, 12, 9),
    "model.mlp_dim": (1408, 1536, 1536, 1024),
    "model.mlp_activation": ("relu2", "relu2", "leaky_relu2", "leaky_relu2"),
    "model.rope_dims": (0, 0, 16, 16),
    "model.rope_base": (50_000.0, 10_000.0, 10_000.0, 10_000.0),
    "model.rope_ntk_len": (0, 0, 1024, 0),
    "model.xsa_layers": (4, 0, 4, 9),
    "model.ln_scale": (False, False, True, True),
    "model.smear": ("after_norm", "after_norm", "after_norm", "before_norm"),
    "model.bigram_buckets": (2048, 4096, 2048, 4096),
    "model.bigram_hash": ("xor", "xor", "xor", "sum"),
    "model.bigram_init_std": (0.0, 0.0, 0.0, 1.0),
    "model.bigram_scale_init": (0.05, 0.05, 0.05, 0.0),
    "model.bigram_proj_gain": (22**-0.5, 20**-0.5, 1.0, 1.0),
    "model.embed_init": ("overtone", "normal", "normal", "normal"),
    "model.resid_mix_init": ("phase", "identity", "identity", "identity"),
    "model.recycle_layers": [(), (), (3, 4), ()],
    "model.attention_gate": (False, False, True, False),
    "model.value_residual": (False, False, True, False),
    "model.value_embed_layers": [(), (), (10, 11), ()],
    "model.value_embed_dim": 128,
    "model.vocab_size": 1024,
    "model.d_model": 512,
    "model.num_heads": 8,
    "model.num_kv_heads": 4,
    "model.max_seq_len": 2048,
    "model.q_gain_init": 1.5,
    "model.bigram_dim": 128,
    "model.matrix_init": "orthogonal",
    "model.embed_init_std": 0.005,
    "model.logit_soft_cap": 30.0,
    "model.smear_mask_bos": False,
    "optim.warmdown_steps": (3000, 3000, 3500, 3500),
    "optim.swa_every": (50, 50, 50, 0),
    "optim.swa_below": (0.4, 0.5, 0.2, 0.5),
    "optim.ema_decay": (0.0, 0.0, 0.997, 0.0),
    "optim.qat_below": 0.0,
    "optim.schedule": "linear_warmdown",
    "optim.warmdown_clock": "wall_clock",
    "optim.warmup_steps": 0,
    "optim.final_lr_fraction": 0.0,
    "optim.newton_schulz_steps": 5,
    "optim.average_table_dtype": "float32",
    "data.batch_tokens": (524_288, 786_432, 786_432, 786_432),
    "data.seq_len": 2048,
    "data.slices": 8,
    "data.shuffle": False,
    "train.max_seconds": 600.0,
    "export.mlp_bits": (5, 5, 5, 8),
    "export.attention_bits": (6, 6, 5, 8),
    "export.embed_bits": (16, 16, 8, 8),
    "export.table_bits": (6, 8, 8, 8),
    "export.late_key_layers": (2, 1, 0, 0),
    "export.control_dtype": ("float32", "float16", "float16", "float32"),
    "export.codes": ("full", "full", "symmetric", "full"),
    "export.clip": ("row_max", "row_max", "search", "percentile"),
    "export.clip_scope": "row",
    "export.table_clip": ("row_max", "percentile", "percentile", "percentile"),
    "export.table_clip_floor": (None, 1.0, None, None),
    "export.table_codes": ("as_matrices", "symmetric", "as_matrices", "as_matrices"),
    "export.clip_floor": (0.0, 0.0, 1.0, 1.0),
    "export.prune_fraction": (0.02, 0.0, 0.0, 0.0),
    "export.packed": False,  # the codes are the submission's; `bench.published` has their form
    "export.codec": "rans",
    "export.codec_level": 22,
    "eval.weights": ("swa", "swa", "swa", "final"),
}


@pytest.mark.parametrize("column", range(4), ids=GOLF)
def test_settings_are_those_of_the_submission(column):
    recipe = flat(load(GOLF[column]))
    for field, values in SETTINGS.items():
        expected = values[column] if isinstance(values, tuple | list) else values
        assert recipe[field] == expected, field


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
    return jax.make_jaxpr(loss)(abstract_parts(config.model)[0], tokens, tokens)


@pytest.mark.parametrize("name", GOLF)
def test_the_program_loops_over_no_tokens_and_repeats_no_constant(name):
    model, T = load(name).model, 2048
    program = gradient_program(name, T)
    found = list(equations(program.jaxpr))
    assert len(found) == len(list(equations(gradient_program(name, 256).jaxpr))), (
        "the program grows with the sequence"
    )
    assert not [e for e in found if e.primitive.name in ("scan", "while")]

    # lookups of the token embedding, the bigram and value tables, and one number for each target
    gathers = [e for e in found if e.primitive.name == "gather"]
    rows = [e for e in gathers if e.params["slice_sizes"][-1] > 1]
    assert len(rows) == 1 + bool(model.bigram_buckets) + bool(model.value_embed_layers)
    assert max(math.prod(e.outvars[0].aval.shape) for e in gathers) == 2 * T * model.d_model

    # in a bfloat16 model only logits and attention scores enter a product as float32, but for
    # products with a column of ones, which are sums
    products = [
        e for e in found if e.primitive.name == "dot_general" and e.outvars[0].aval.shape[-1] > 1
    ]
    shapes = [v.aval.shape for e in products for v in e.invars if v.aval.dtype == jnp.float32]
    assert all(shape[-1] == model.vocab_size or shape.count(T) == 2 for shape in shapes), shapes

    # the tables of rotary positions enter once, and no causal mask does
    large = [np.shape(c) for c in program.consts if np.size(c) > 1]
    assert sorted(large) == [(1, T, model.rotary_dims // 2)] * 2
    assert not [e for e in found if e.primitive.name in ("cos", "sin")]


def few_steps(config: Config, steps: int) -> list[float]:
    """The losses of the first steps on random tokens that repeat, one device."""
    d, state, seen = config.data, begin(config), []
    batch = host_batch(0, config.model.vocab_size, (d.batch_tokens // d.seq_len, d.seq_len))
    for i in range(steps):
        late = i >= steps - 2
        state, metrics = take(config, state, batch, swa=late, qat=late)
        seen.append(metrics["loss"])
    assert (state.swa is not None) == bool(config.optim.swa_every)
    assert state.swa is None or int(state.swa.count) == 2
    assert (state.ema is not None) == bool(config.optim.ema_decay)
    assert all_finite((state.params, state.ema, state.swa))
    return seen


@pytest.mark.parametrize("name", ["golf_11l_xsa4", "golf_12l_recycled", "golf_9l_xsa_ngram"])
def test_a_shrunk_recipe_learns(name):
    """At half of its depth, 1/16 of its width."""
    recipe = load(name)
    m, half = recipe.model, recipe.model.num_layers // 2
    sizes = {"vocab_size": 64, "num_layers": half, "d_model": 32, "num_heads": 2}
    sizes |= {"num_kv_heads": 1, "bigram_dim": 8, "value_embed_dim": 8}
    config = changed(
        recipe,
        model=sizes
        | {
            "xsa_layers": min(m.xsa_layers, half),
            "value_embed_layers": tuple(layer - half for layer in m.value_embed_layers),
            "recycle_layers": tuple(layer - 2 for layer in m.recycle_layers),
            "mlp_dim": m.mlp_dim * 32 // m.d_model,
            "rope_dims": min(m.rope_dims, 4),
            "rope_ntk_len": min(m.rope_ntk_len, 8),
            "bigram_buckets": min(m.bigram_buckets, 32),
        },
        optim={"qat_below": 0.2, "muon_momentum_warmup_steps": 2},
        data={"batch_tokens": 256, "seq_len": 16},
    )
    seen = few_steps(config, 8)
    assert seen[0] == pytest.approx(math.log(64), abs=0.05)
    assert seen[-1] < 0.8 * seen[0]


@pytest.mark.full
def test_the_largest_recipe_takes_its_first_steps_at_full_width():
    """With two of the five Newton–Schulz steps, which are nearly all of the work at this batch."""
    optim = {"newton_schulz_steps": 2, "newton_schulz_dtype": "float32"}
    data = {"batch_tokens": 512, "seq_len": 64}
    seen = few_steps(changed(load("golf_12l_recycled"), optim=optim, data=data), 3)
    assert seen[0] == pytest.approx(math.log(1024), abs=0.1)
    assert seen[-1] < seen[0] - 0.3
