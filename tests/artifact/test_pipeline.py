"""Tensors by the policy: how each is kept, and what cannot be kept."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Quantized, dequantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config, ExportConfig, ModelConfig
from sngpt_jax.optim import qat

UP = "blocks/0/mlp/up"
SHAPES = {
    UP: (48, 64),
    "blocks/0/attn/key": (48, 24),
    "blocks/1/attn/key": (48, 24),
    "bigram/proj": (16, 48),
    "embed/table": (40, 48),
    "bigram/table": (30, 16),
    "blocks/0/attn_scale": (48,),
}
EXPORT = ExportConfig(
    mlp_bits=5,
    attention_bits=6,
    embed_bits=16,
    table_bits=4,
    late_key_layers=1,
    control_dtype="float16",
    clip_floor=0.05,
)
CONFIG = Config(model=ModelConfig(num_layers=2), export=EXPORT)


def tensors():
    rng, size = np.random.default_rng(0), np.float32(0.1)
    return {name: size * rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def test_each_tensor_is_kept_as_the_policy_says():
    stored = quantize_tensors(tensors(), CONFIG)
    kept = {
        name: t.bits if isinstance(t, Quantized) else t.dtype.name for name, t in stored.items()
    }
    assert kept == {
        "bigram/proj": "float16",
        "bigram/table": 4,
        "blocks/0/attn/key": 6,
        "blocks/0/attn_scale": "float16",
        "blocks/0/mlp/up": 5,
        "blocks/1/attn/key": "float16",
        "embed/table": "float16",
    }
    assert list(stored) == sorted(stored)
    for name, tensor in tensors().items():
        back = dequantize(stored[name])
        assert back.dtype == np.float32 and back.shape == tensor.shape and back.flags.c_contiguous
        bound = 0.6 / 7 * 0.1 * 4 if name == "bigram/table" else 0.05
        assert 0 < np.abs(back - tensor).max() < bound, name


def test_tables_may_have_a_floor_and_codes_of_their_own():
    """As submission 465 ran: its matrices had neither."""
    own = replace(EXPORT, codes="full", clip_floor=0.0, table_clip_floor=1.0, table_bits=8)
    own = replace(own, table_codes="symmetric")
    stored = quantize_tensors(tensors(), replace(CONFIG, export=own))
    table, up = stored["bigram/table"], stored[UP]
    assert (table.q_min, up.q_min) == (-127, -16)
    assert np.array_equal(table.scales, np.full(30, 1 / 127, np.float16))
    exact = tensors()["bigram/table"] / np.float64(np.float16(1 / 127))
    assert np.abs(table.codes - exact).max() <= 0.5 + 1e-6
    assert up.scales.max() < 0.6 / 15


def test_matrices_are_what_late_quantization_aware_training_imitates():
    """To the last bit."""
    found = tensors()
    up, key = (jnp.asarray(found[name]) for name in (UP, "blocks/0/attn/key"))
    nested = {"blocks": {"0": {"mlp": {"up": up}, "attn": {"key": key}}}}
    trained = jax.jit(lambda p: qat.on_grid(p, CONFIG))(nested)["blocks"]["0"]
    stored = quantize_tensors(found, CONFIG)
    np.testing.assert_array_equal(dequantize(stored[UP]), trained["mlp"]["up"])
    np.testing.assert_array_equal(dequantize(stored["blocks/0/attn/key"]), trained["attn"]["key"])


def test_pruning_takes_the_smallest_of_each_tensor_and_leaves_gains_alone():
    pruned = replace(CONFIG, export=replace(EXPORT, prune_fraction=0.25, passthrough_size=500))
    stored = quantize_tensors(tensors(), pruned)
    for name, tensor in tensors().items():
        smallest = np.abs(tensor) <= np.quantile(np.abs(tensor), 0.25)
        zeros = dequantize(stored[name]) == 0
        if name == "blocks/0/attn_scale" or tensor.size <= 500:
            assert zeros.mean() < 0.25, name
        else:
            assert zeros[smallest].all(), name


def test_gptq_rounds_the_matrices_that_it_knows_the_inputs_of():
    mixing = np.random.default_rng(3).standard_normal((48, 48))
    moment = mixing @ mixing.T  # of strongly correlated inputs
    export = replace(EXPORT, mlp_bits=3, attention_bits=16)
    gptq = replace(export, gptq=True, gptq_block=16)
    near = quantize_tensors(tensors(), replace(CONFIG, export=export))[UP]
    better = quantize_tensors(tensors(), replace(CONFIG, export=gptq), {UP: moment})[UP]
    np.testing.assert_array_equal(near.scales, better.scales)

    def output_error(stored):
        e = tensors()[UP] - dequantize(stored)
        return np.trace(e.T @ moment @ e)

    assert output_error(better) < 0.7 * output_error(near)


@pytest.mark.parametrize(
    ("name", "spoil", "export", "problem"),
    [
        (UP, np.nan, {}, "nan"),
        ("embed/table", 1e6, {}, "1000000.0 is not a finite float16"),
        ("blocks/0/attn_scale", np.inf, {"control_dtype": "float32"}, "inf is not a finite"),
        ("blocks/0/attn/key", 1e38, {}, "a row needs the range 1e.38"),
        (UP, 0.0, {"gptq": True}, "needs the second moments"),
    ],
)
def test_what_cannot_be_kept_is_one_line_that_names_the_tensor(name, spoil, export, problem):
    found = tensors()
    found[name].reshape(-1)[0] = spoil
    with pytest.raises(UserError, match=f"^{name}: .*{problem}.*$"):
        quantize_tensors(found, replace(CONFIG, export=replace(EXPORT, **export)))
