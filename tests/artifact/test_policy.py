"""The published policies tensor by tensor, and the recipe's fields."""

from collections import Counter

import pytest

from sngpt_jax.artifact.policy import is_exported, policy_of
from sngpt_jax.cluster.mesh import leaves_by_path
from sngpt_jax.config import Config, ExportConfig, ModelConfig, parse_levels
from sngpt_jax.config.recipe import load
from sngpt_jax.model.forward import abstract_variables


def kept_as(config):
    """The number of tensors by group and bits."""
    leaves = leaves_by_path(abstract_variables(config.model)).items()
    policies = [policy_of(name, leaf.shape, config) for name, leaf in leaves]
    return Counter((policy.group, policy.bits) for policy in policies)


# counted by hand in the submissions' descriptions and code: 2 matrices of the MLP and 4 of the
# attention per layer
PUBLISHED = {
    "golf_11l_xsa4": {
        ("mlp", 5): 22, ("attention", 6): 42, ("attention", 16): 2,
        ("embed", 16): 1, ("table", 6): 1, ("projection", 16): 1,
        # a block's gains, resid_mix and two scales; skips, smear, bigram scale
        ("control", 32): 11 * 4 + 3,
    },
    "golf_10l_int5mlp": {
        ("mlp", 5): 20, ("attention", 6): 39, ("attention", 16): 1,
        ("embed", 16): 1, ("table", 8): 1, ("projection", 16): 1,
        ("control", 16): 10 * 4 + 3,
    },
    "golf_12l_recycled": {
        ("mlp", 5): 24, ("attention", 5): 48,
        ("embed", 8): 1, ("table", 8): 2, ("projection", 16): 2,
        # gates' weight and bias, value mix; value scales; recycle
        ("control", 16): 12 * 7 + 3 + 2 + 2,
    },
    "golf_9l_xsa_ngram": {
        ("mlp", 8): 18, ("attention", 8): 36,
        ("embed", 8): 1, ("table", 8): 1, ("projection", 16): 1,
        ("control", 32): 9 * 4 + 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_the_published_policies(recipe):
    assert kept_as(load(recipe)) == PUBLISHED[recipe]


def test_the_last_layers_keys_are_the_ones_in_half_precision():
    config = load("golf_11l_xsa4")
    bits = [policy_of(f"blocks/{i}/attn/key", (512, 256), config).bits for i in range(11)]
    assert bits == [6] * 9 + [16] * 2
    assert policy_of("blocks/10/attn/value", (512, 256), config).bits == 6


def test_tables_have_their_own_clip_and_rows():
    export = ExportConfig(clip="sd", clip_sd=9.0, table_clip="percentile", table_clip_sd=11.0)
    config = Config(export=export)
    matrix = policy_of("blocks/0/mlp/up", (4, 8), config)
    table = policy_of("embed/table", (8, 4), config)
    assert (matrix.clip, matrix.clip_sd, matrix.transposed) == ("sd", 9.0, True)
    assert (table.clip, table.clip_sd, table.transposed) == ("percentile", 11.0, False)


def test_small_tensors_pass_and_gains_do_so_in_their_own_precision():
    config = Config(export=ExportConfig(passthrough_size=32, control_dtype="float32"))
    assert policy_of("blocks/0/mlp/up", (4, 8), config).bits == 16
    assert policy_of("blocks/0/mlp/up", (4, 9), config).bits == 8
    assert policy_of("final_norm", (4,), config).bits == 32
    half = Config(export=ExportConfig(control_dtype="float16"))
    assert policy_of("final_norm", (4,), half).bits == 16


def test_sparse_codes_keep_their_statistics_and_not_their_step_counts():
    levels = parse_levels("4,2,0;5,2,4")
    model = ModelConfig(family="pre_norm", d_model=16, num_layers=1, levels=levels)
    leaves = leaves_by_path(abstract_variables(model))
    kept = {name for name, leaf in leaves.items() if is_exported(leaf.dtype)}
    assert {"blocks/0/code/mean", "blocks/0/code/std", "blocks/0/code/bias"} <= kept
    assert leaves.keys() - kept == {"blocks/0/code/last_fired"}
