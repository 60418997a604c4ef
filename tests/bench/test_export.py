"""The benchmarks of exports on the tiny model: their figures agree with each other."""

import json

import pytest

from tests import tiny_run

pytestmark = pytest.mark.slow


def test_bench_times_the_parts_and_accounts_for_the_bytes(tiny_recipe):
    options = ["--repeats", "2", "--sigma", "0.1", "--limit", "1000000"]
    done = tiny_run.run("bench", "export", "--config", tiny_recipe, *options, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["seconds"].keys() == {"quantize", "encode", "codec_alone", "decode", "dequantize"}
    assert (
        all(seconds > 0 for seconds in result["seconds"].values()) and result["ratio_to_codec"] > 0
    )
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert (
        sum(group["weights"] for group in result["bits_per_weight"].values())
        == result["parameters"]
    )
    again = json.loads(
        tiny_run.run("bench", "export", "--config", tiny_recipe, *options, "--json").stdout
    )
    assert again["artifact_bytes"] == result["artifact_bytes"], "drawn from the seed"
    done = tiny_run.run("bench", "export", "--config", tiny_recipe, "--repeats", "0")
    assert done.returncode == 2 and "--repeats must be 1 or more" in done.stderr


def test_compare_puts_the_policies_side_by_side(tiny_trained):
    options = ["--passthrough-size", "0", "--gptq-tokens", "4096", "--tokens", "2048"]
    done = tiny_run.run("bench", "policies", "--run", tiny_trained, *options, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["policy"]: row for row in result["rows"]}
    assert {
        "#333",
        "#465",
        "#1573",
        "#740",
        "int6 SDClip k=12.85, rANS",
        "int6 SDClip k=12.85, GPTQ, rANS",
    } <= rows.keys()
    for row in rows.values():
        assert row["gap"] == pytest.approx(row["bpb"] - result["before"]["bpb"])
        assert 0 < row["entropy"] * 0.95 < row["coded"] and 0 < row["error"] < 0.2
    by_bits = [rows[f"int{bits} row max, rANS"] for bits in (8, 6, 5)]
    assert by_bits[0]["error"] < by_bits[1]["error"] < by_bits[2]["error"]
    assert by_bits[0]["bytes"] > by_bits[1]["bytes"] > by_bits[2]["bytes"]
    assert rows["#1573, rANS"]["bpb"] == rows["#1573"]["bpb"], (
        "how codes are stored changes no weight"
    )
    assert (
        rows["#1573, rANS"]["bytes"]
        < rows["#1573, one byte per code"]["bytes"]
        < rows["#1573"]["bytes"]
    )
    near, better = rows["int6 SDClip k=12.85, rANS"], rows["int6 SDClip k=12.85, GPTQ, rANS"]
    assert better["error"] > near["error"], (
        "GPTQ gives up nearness to the weights for nearness of the outputs"
    )
