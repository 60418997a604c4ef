"""The sparse recipes: the settings of the published models, the large one's layout and step."""

import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from sngpt_kernels.cayley import dictionary

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import changed, parse_levels
from sngpt_jax.config.recipe import load
from sngpt_jax.data.prepared import spec_of
from sngpt_jax.data.spec import PrepareSpec
from sngpt_jax.training.state import Shapes
from tests.training.steps import begin, host_batch, take

ROOT = Path(__file__).parents[2]
SIZES = ("num_layers", "d_model", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size")
SMALL, LARGE = (12, 1024, 8, 8, 4096, 50_304), (24, 2048, 16, 16, 8192, 50_257)
BACKBONE = {
    "family": "pre_norm",
    "positions": "learned",
    "qk_norm": False,
    "mlp_activation": "gelu",
    "max_seq_len": 1024,
    "norm_eps": 1e-5,
    "logit_soft_cap": 0.0,
    "matrix_init": "normal",
    "matrix_init_std": 0.02,
    "embed_init_std": 0.02,
    "forward_standardized": True,
    "generators": "spread",
}
OPTIM = {
    "grad_clip": 1.0,
    "muon_momentum": 0.95,
    "muon_momentum_warmup_steps": 0,
    "muon_weight_decay": 0.0,
    "adam_weight_decay": 0.0,
    "adam_b1": 0.9,
    "adam_b2": 0.95,
    "warmup_steps": 200,
}
RECIPES = {
    "cayley_small_3l": (SMALL, "10,16,0;15,32,256;17,64,256", 0.9, 12_716),
    "cayley_small_2l": (SMALL, "10,16,0;15,32,256", 0.9, 12_716),
    "cayley_small_1l": (SMALL, "10,16,0", 0.9, 6358),
    "cayley_small_dense": (SMALL, "", 0.9, 12_716),
    "cayley_large_3l": (LARGE, "11,16,0;15,32,256;17,64,256", 0.5, 12_716),
    "cayley_large_2l": (LARGE, "11,16,0;15,32,256", 0.5, 12_716),
}


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_those_of_the_cards(name):
    sizes, levels, warmdown, steps = RECIPES[name]
    config = load(name)
    for section, wanted in (
        (config.model, dict(zip(SIZES, sizes, strict=True)) | BACKBONE),
        (config.model, {"levels": parse_levels(levels)}),
        (config.optim, {**OPTIM, "warmdown_fraction": warmdown}),
        (config.data, {"batch_tokens": 1_572_864, "seq_len": 1024}),
        (config.train, {"steps": steps, "fsdp": 8 if sizes is LARGE else 1}),
    ):
        assert {field: getattr(section, field) for field in wanted} == wanted
    assert config.model.logit_chunk, "float32 logits of 50,000 tokens would exist whole"
    width = config.model.d_model
    for level, size in zip(
        range(len(config.model.levels)), (width, 2**15 - width, 2**17 - 2**15), strict=False
    ):
        assert dictionary.reachable(config.model.levels, level) == size


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_that_prepares_makes_what_the_recipe_takes(name):
    """The docstring's command, its lines joined, read by the command's own parser."""
    text = (ROOT / "configs" / f"{name}.py").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"launch.sh prepare (.*)", text)
    spec = tyro.cli(PrepareSpec, args=command.split())
    assert spec == replace(spec_of(load(name)), vocab_size=0)  # the tokenizer says it


def test_the_large_state_is_spread_over_eight_devices():
    """An eighth of every matrix and of its moments is on each device, at full depth."""
    state = Shapes.of(load("cayley_large_3l"), make_mesh(fsdp=8)).state
    leaves = jax.tree.leaves((state.params, state.opt_state))

    def on_one_device(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape))

    whole, share = sum(leaf.size for leaf in leaves), sum(map(on_one_device, leaves))
    assert whole > 2.1e9
    assert share == pytest.approx(whole / 8, rel=0.05)
    assert all(on_one_device(leaf) * 8 == leaf.size for leaf in leaves if leaf.ndim == 2)


@pytest.mark.full
def test_one_step_of_the_large_model_at_full_width():
    """With two layers, few tokens and rows, and one Newton–Schulz iteration, for a CPU."""
    config = changed(
        load("cayley_large_3l"),
        model={"num_layers": 2, "vocab_size": 2048, "logit_chunk": 8},
        optim={"newton_schulz_steps": 1, "newton_schulz_dtype": "float32", "warmup_steps": 0},
        data={"batch_tokens": 8 * 16, "seq_len": 16, "slices": 1},
        train={"device_batch_tokens": 16},
    )
    state = begin(config, 8, config.train.fsdp)
    before = [float(leaf.sum()) for leaf in jax.tree.leaves(state.params)]
    batch = host_batch(0, 2048, (8, 16))
    state, metrics = take(config, state, batch, devices=8, fsdp=config.train.fsdp)
    # logits are normal with variance 2048 · 0.02², independent of the target
    assert metrics["loss"] == pytest.approx(np.log(2048) + 2048 * 0.02**2 / 2, rel=0.02)
    assert 0 < metrics["grad_norm"] < 100
    for leaf, old in zip(jax.tree.leaves(state.params), before, strict=True):
        assert np.isfinite(float(leaf.sum())) and float(leaf.sum()) != old
        assert leaf.ndim != 2 or leaf.sharding.shard_shape(leaf.shape) != leaf.shape
    for block in state.statistics["blocks"].values():
        assert int(block["code"]["last_fired"].max()) == 1
        assert float(np.abs(block["code"]["std"] - 1).max()) < 0.1
