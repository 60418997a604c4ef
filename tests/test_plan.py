"""The plan's counts against published totals, the compiler's own FLOP count, and the bytes of a
real state.
"""

import json

import jax
import numpy as np
import pytest

from sngpt_jax import plan
from sngpt_jax.ahead import targets
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from sngpt_jax.config.recipe import load
from sngpt_jax.model.forward import abstract_parts, forward
from sngpt_jax.training.cost import forward_flops_per_token, make_plan
from sngpt_jax.training.state import Shapes, init_state


def planned(config):
    return make_plan(Shapes.of(config, make_mesh(jax.devices()[:1])))


def sum_of_groups(parameters):
    return sum(count for name, count in parameters.items() if name not in ("total", "backbone"))


# The cards' sizes: positions and the biases of the codes are left out of the small ones',
# positions are in the large ones'
CAYLEY = {
    "cayley_small_3l": (202_531_840, 1024 * 1024, 12 * 2**17),
    "cayley_small_2l": (202_531_840, 1024 * 1024, 12 * 2**15),
    "cayley_small_1l": (202_531_840, 1024 * 1024, 12 * 2**10),
    "cayley_small_dense": (202_531_840, 1024 * 1024, 0),
    "cayley_large_3l": (1_313_083_392 - 1024 * 2048, 1024 * 2048, 24 * 2**17),
    "cayley_large_2l": (1_313_083_392 - 1024 * 2048, 1024 * 2048, 24 * 2**15),
}


@pytest.mark.parametrize("name", CAYLEY)
def test_sizes_of_the_sparse_models(name):
    totals = planned(load(name))
    parameters = totals["parameters"]
    backbone, positions, sae_bias = CAYLEY[name]
    found = [parameters[name] for name in ("backbone", "positions", "sae_bias")]
    assert found == [backbone, positions, sae_bias]
    assert parameters["total"] == sum(found) == sum_of_groups(parameters)
    layers = 12 if positions == 2**20 else 24
    statistics = 2 * 4 * sae_bias + (4 * positions // 1024) * layers
    assert totals["bytes"]["statistics"] == statistics * bool(sae_bias)
    assert totals["tokens"]["step"] == 1_572_864


def test_operations_of_the_codes():
    """Small 3L: 16 parents with 248 children and 32 with 192, each scored over 1024 dimensions;
    112 atoms summed.
    """
    flops = planned(load("cayley_small_3l"))["flops_per_token"]
    assert flops["code"] == 12 * (2 * 1024 * (16 * 248 + 32 * 192 + 112) + 2 * 1024 * (32 + 32))
    dense = planned(load("cayley_small_dense"))["flops_per_token"]
    assert dense == {**flops, "code": 0}


def test_baseline_counts():
    totals = planned(load("golf_baseline"))
    parameters = totals["parameters"]
    found = [parameters[name] for name in ("backbone", "positions", "sae_bias")]
    assert found == [17_059_912, 0, 0]
    assert parameters["total"] == sum_of_groups(parameters) == 17_059_912
    assert parameters["embed"] == 1024 * 512
    assert parameters["mlp"] == 9 * 2 * 512 * 1024
    assert totals["bytes"]["parameters"] == 4 * 17_059_912
    square = 4 * 512**3 + 2 * 512**3
    wide = 4 * 512**2 * 1024 + 2 * 512**3
    tall = 4 * 256**2 * 512 + 2 * 256**3
    assert totals["flops_per_step"]["optimizer"] == 9 * 5 * (2 * square + 2 * wide + 2 * tall)
    assert totals["tokens"] == {"step": 524_288, "run": 524_288 * 20_000}


def test_forward_flops_agree_with_the_compiler():
    """XLA counts the whole T x T attention and a few element-wise operations; the plan counts its
    causal half.
    """
    config = Config(
        model=ModelConfig(
            num_layers=2, d_model=256, num_heads=4, num_kv_heads=2, mlp_dim=1024, max_seq_len=128
        ),
        optim=OptimConfig(schedule="constant"),
        data=DataConfig(batch_tokens=1024, seq_len=128),
        train=TrainConfig(steps=1),
    )
    T, m = 128, config.model
    tokens = jax.ShapeDtypeStruct((2, T), np.int32)
    cost = jax.jit(forward(m)).lower(abstract_parts(m)[0], tokens).compile().cost_analysis()
    masked_half = m.num_layers * 2 * 2 * m.d_model * (T - 1) // 2
    counted = forward_flops_per_token(config) + masked_half
    assert cost["flops"] / (2 * T) == pytest.approx(counted, rel=0.05)


def test_bytes_are_those_of_a_real_state(tiny_recipe):
    config = load(str(tiny_recipe))
    shapes = Shapes.of(config, make_mesh(jax.devices()[:1]))
    state, totals = init_state(shapes), make_plan(shapes)["bytes"]
    assert totals["parameters"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert totals["optimizer"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert jax.tree.structure(shapes.state) == jax.tree.structure(state)


def test_the_command_prints_text_or_json(capsys, tmp_path):
    baseline, path = ["--config", "golf_baseline"], tmp_path / "plan.json"
    assert plan.main([*baseline, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "17,059,912" in text and "blocks/*/attn/query" in text
    assert json.loads(path.read_text())["parameters"]["total"] == 17_059_912
    assert plan.main([*baseline, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 17_059_912


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100", "expected DEVICExNUMBER, such as h100x8"),
        ("v100x8", "of: a100, h100, h200, b200"),
        ("h100x12", "has 12 devices; expected at most 8, or a multiple of 8 up to 1024"),
        ("h100x3", "which do not divide over 3 devices"),
    ],
)
def test_topology_that_there_is_not(topology, message):
    with pytest.raises(UserError, match=message):
        plan.main(["--config", "golf_baseline", "--topology", topology])


def test_topology_without_the_plugin_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(targets, "has_plugin", lambda: False)
    with pytest.raises(UserError, match=r"--topology: .*pip install 'sngpt-jax\[cuda13\]'"):
        plan.main(["--config", "golf_baseline", "--topology", "h100x8"])
