"""The benchmarks of exports and of scoring on the tiny model: their figures agree."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sngpt_jax.artifact import bundle, codecs
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.header import Storage
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.quantize import Quantized
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import __main__ as command
from sngpt_jax.bench import export, published
from sngpt_jax.bench.export import codec_jobs, draw
from sngpt_jax.config.recipe import load

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(capsys, monkeypatch):
    """A benchmark's JSON result, with a stand-in for the program, which takes long to pack."""
    monkeypatch.setattr(bundle, "build", lambda: bundle.Bundle(bytes(1000), (), ()))

    def run(*arguments):
        assert command.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_bench_times_the_parts_and_accounts_for_the_bytes(tiny_recipe, bench):
    arguments = ["export", "--config", tiny_recipe, "--repeats", 2, "--sigma", 0.1]
    result = bench(*arguments)
    assert result["against_published"] is None
    assert result["seconds"].keys() == {"quantize", "encode", "codec_alone", "decode", "dequantize"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["ratio_to_codec"] > 0
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    weights = sum(group["weights"] for group in result["bits_per_weight"].values())
    assert weights == result["parameters"]
    assert bench(*arguments)["artifact_bytes"] == result["artifact_bytes"], "drawn from the seed"
    with pytest.raises(UserError, match="--repeats must be 1 or more"):
        bench(*arguments[:3], "--repeats", 0)


@pytest.mark.parametrize("recipe", ["golf_10l_int5mlp", "golf_12l_recycled"])
def test_same_codes_take_no_more_bytes_than_in_the_scripts_form(recipe):
    config = load(recipe)
    small = replace(config.model, d_model=256, num_heads=4, num_kv_heads=2, mlp_dim=512)
    # one grid of every kind, large enough that its codes outweigh the file's header
    export = replace(config.export, passthrough_size=16_384)
    config = replace(config, model=small, export=export)
    stored, said = quantize_tensors(draw(config, 0.16), config), []
    found = published.compare(recipe, config, stored, said.append)
    script, form, default = found["bytes"].values()
    assert form <= 1.005 * script and default <= script
    assert default <= 0.85 * script or recipe != "golf_12l_recycled"
    assert found["coded_bytes"] <= 1.01 * found["entropy_bytes"]
    assert f"{default:,}" in said[3] and "each tensor" in said[-1]


def test_published_form_is_that_of_a_submission(monkeypatch):
    monkeypatch.setattr(export, "draw", lambda *_: pytest.fail("refused after the work"))
    with pytest.raises(UserError, match="golf_baseline is none of golf_11l_xsa4, "):
        command.main(["export", "--config", "golf_baseline", "--against-published"])


def test_scripts_file_is_one_compressed_block_of_codes_scales_and_floats():
    grid = Quantized(np.int8([[1, -2, 3, 0]]), np.float16([0.5]), 5, -15, True)
    stored = {"a": grid, "b": np.float32([7])}
    raw = bytes([1, 254, 3, 0]) + np.float16(0.5).tobytes() + np.float32(7).tobytes()
    byte_form, packed = Storage(False, "zstd", 3), Storage(True, "lzma", 9)
    assert published.script_bytes(stored, byte_form) == len(codecs.compress(raw, "zstd", 3))
    joined = (16 + (13 << 5) + (18 << 10) + (15 << 15)).to_bytes(5, "little") + raw[4:]
    assert published.script_bytes(stored, packed) == len(codecs.compress(joined, "lzma", 9))


@pytest.mark.parametrize("packed", [False, True])
def test_codec_alone_has_the_streams_of_an_artifact(packed):
    rng = np.random.default_rng(0)
    codes = rng.integers(-15, 16, (3, 8, 64), np.int8)
    stored = {
        f"w{i}": Quantized(x, np.ones(8, np.float16), 5, -15, True) for i, x in enumerate(codes)
    }
    storage = Storage(packed, "lzma", 6)
    of_codec = sorted(len(job()) for _, job in codec_jobs(stored, storage))
    encoded = artifact.encode({}, stored, storage)
    assert sum(of_codec) == len(encoded.data) - encoded.header_bytes
    assert len(of_codec) == (2 if packed else 4)


def test_scoring_beside_the_forward_pass_and_the_caches(tiny_recipe, bench):
    options = ["--batches", 1, "--repeats", 1, "--cache-targets", 500, "--stride", 8]
    result = bench("scoring", "--config", tiny_recipe, *options)
    speeds = result["forward_tok_per_s"]
    for kind, share in result["share_of_forward"].items():
        assert share == speeds[f"score_{kind}"] / speeds[f"forward_{kind}"] > 0
    assert result["cache_targets"] == 500
    for mode in ("exact", "tilt"):
        assert result["caches"][mode]["mass"]["mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.full
def test_policies_stand_side_by_side(tiny_trained, bench):
    options = ["--passthrough-size", 0, "--gptq-tokens", 4096, "--tokens", 2048]
    result = bench("policies", "--run", tiny_trained, *options)
    rows = {row["policy"]: row for row in result["rows"]}
    sd = "int6 SDClip k=12.85"
    published = {"#333", "#465", "#1573", "#740"}
    assert published | {f"{sd}, rANS", f"{sd}, GPTQ, rANS"} <= rows.keys()
    for row in rows.values():
        assert row["gap"] == pytest.approx(row["bpb"] - result["before"]["bpb"])
        assert 0 < row["entropy"] * 0.95 < row["coded"] and 0 < row["error"] < 0.2
    by_bits = [rows[f"int{bits} row max, rANS"] for bits in (8, 6, 5)]
    assert by_bits[0]["error"] < by_bits[1]["error"] < by_bits[2]["error"]
    assert by_bits[0]["bytes"] > by_bits[1]["bytes"] > by_bits[2]["bytes"]
    kinds = ", rANS", ", one byte per code", ""
    plain, bytewise, packed = (rows[f"#1573{kind}"] for kind in kinds)
    assert plain["bpb"] == packed["bpb"]  # the storage of codes changes no weight
    assert plain["bytes"] < bytewise["bytes"] < packed["bytes"]
    # GPTQ gives up nearness to the weights for nearness of the outputs
    assert rows[f"{sd}, GPTQ, rANS"]["error"] > rows[f"{sd}, rANS"]["error"]
