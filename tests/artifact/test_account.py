"""What the report counts, against counts by hand."""

import numpy as np
import pytest

from sngpt_jax.artifact import account
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Quantized
from sngpt_jax.artifact.sngpt_file import Storage
from sngpt_jax.config import Config, ExportConfig, ModelConfig

CONFIG = Config(
    model=ModelConfig(num_layers=2),
    export=ExportConfig(mlp_bits=5, late_key_layers=1, codec="lzma", codec_level=6),
)


SHAPES = {
    "blocks/0/mlp/up": (96, 64),
    "blocks/0/attn/key": (64, 32),
    "blocks/1/attn/key": (64, 32),
    "smear/gate": (64,),
}
_rng = np.random.default_rng(1)
TENSORS = {name: _rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
STORED = quantize_tensors(TENSORS, CONFIG)
BYTEWISE, PACKED = (artifact.encode({}, STORED, Storage(p, "lzma", 6)) for p in (False, True))
LINES = account.report(TENSORS, STORED, BYTEWISE, CONFIG)
UP = "blocks/0/mlp/up"


def test_the_lines_share_out_the_payload():
    assert [(line.group, line.width, line.tensors, line.weights) for line in LINES] == [
        ("attention", "float16", 1, 2048),
        ("attention", "int8", 1, 2048),
        ("control", "float32", 1, 64),
        ("mlp", "int5", 1, 6144),
    ]
    assert sum(line.bytes for line in LINES) == len(BYTEWISE.data) - BYTEWISE.header_bytes
    mlp = LINES[-1]
    assert mlp.coded == pytest.approx(8 * BYTEWISE.tensor_bytes[UP] / 6144)
    assert mlp.scales == pytest.approx(16 * 64 / 6144)
    assert mlp.packing_loss == 0


def test_entropy_and_error_are_those_of_the_codes():
    tensor, w = STORED[UP], TENSORS[UP].astype(np.float64)
    shares = [np.mean(tensor.codes == code) for code in range(-15, 16)]
    assert LINES[-1].entropy == pytest.approx(-sum(p * np.log2(p) for p in shares if p))
    back = (tensor.scales.astype(np.float64)[:, None] * tensor.codes).T
    assert LINES[-1].error == pytest.approx(np.sum((w - back) ** 2) / np.sum(w**2), rel=1e-5)
    assert LINES[0].entropy is None and 0 < LINES[0].error < 1e-6
    assert LINES[2].error == 0


def test_what_packing_costs_is_against_the_same_codes_a_byte_each():
    lines = account.report(TENSORS, STORED, PACKED, CONFIG, BYTEWISE)
    lost = PACKED.tensor_bytes[UP] - BYTEWISE.tensor_bytes[UP]
    assert lines[-1].packing_loss == pytest.approx(8 * lost / 6144)
    assert lines[-1].packing_loss > 0.2, "LZMA sees no bytes in packed codes"
    assert lines[1].packing_loss == 0, "8 bits are bytes"


def test_relative_error_weighs_tensors_by_their_size_and_not_their_unit():
    original = {"a": np.float32([1, 1, 1]), "b": np.float32([100]), "c": np.zeros(4, np.float32)}
    stored = {"a": np.float32([1, 1, 0]), "b": np.float32([50]), "c": np.zeros(4, np.float32)}
    expected = (3 * (1 / 3) + 1 * 0.25 + 0) / 8
    assert account.relative_error(original, stored) == pytest.approx(expected)


def test_json_names_a_group_by_its_width_where_it_has_two():
    assert list(account.as_json(LINES)) == ["attention_float16", "attention_int8", "control", "mlp"]
    table = account.format_table(LINES).splitlines()
    assert len(table) == 5 and len({len(row) for row in table}) == 1


def test_a_quantized_tensor_of_zeros_has_no_entropy():
    zeros = Quantized(np.zeros((4, 8), np.int8), np.ones(4, np.float16), 5, -15, False)
    assert account.entropy_of(zeros) == 0
