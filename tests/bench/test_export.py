"""The benchmarks of exports and of scoring on the tiny model: their figures agree."""

import json

import pytest

from sngpt_jax.artifact import bundle
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import __main__ as command

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
    assert result["seconds"].keys() == {"quantize", "encode", "codec_alone", "decode", "dequantize"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["ratio_to_codec"] > 0
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    weights = sum(group["weights"] for group in result["bits_per_weight"].values())
    assert weights == result["parameters"]
    assert bench(*arguments)["artifact_bytes"] == result["artifact_bytes"], "drawn from the seed"
    with pytest.raises(UserError, match="--repeats must be 1 or more"):
        bench(*arguments[:3], "--repeats", 0)


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
