"""The kernels' benchmark on a host processor, and the search for block sizes."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sngpt_kernels import dispatch
from sngpt_kernels.xsa import specs

from sngpt_jax.ahead import targets
from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import __main__ as command
from sngpt_jax.bench import harness, tune
from sngpt_jax.bench import kernels as bench
from tests.kernels import toy_case

H100 = targets.find("h100")
TITLE = {"operation": "xsa", "case": "golf", "pass": "forward_backward"}


def test_times_are_of_one_call() -> None:
    """Of a function that waits: a busy machine can only add to its time."""
    calls: list[int] = []

    def slow(x: jax.Array) -> jax.Array:
        calls.append(int(x))
        time.sleep(0.01)
        return x

    def fresh(i: int) -> list[tuple[jax.Array]]:
        return [(jnp.asarray(2 * i),), (jnp.asarray(2 * i + 1),)]

    (low, median, _), is_host_bound = harness.time_calls(slow, fresh, rounds=3)
    assert 0.01 <= low <= median < 1 and is_host_bound  # the host did the work
    assert set(calls) == set(range(6))  # every round has arguments of its own, and uses all


def test_median_and_quartiles() -> None:
    assert harness.quartiles((5.0, 1.0, 2.0, 4.0, 3.0)) == (2, 3, 4)


@pytest.mark.parametrize(("target", "count"), [(None, 2), (dataclasses.replace(H100, l2=2**18), 4)])
def test_argument_sets_are_fresh_and_outgrow_the_cache(
    target: targets.Target | None, count: int
) -> None:
    fresh = harness.argument_sets(toy_case.CASE, "forward_backward", target)
    first, second = fresh(0), fresh(1)
    assert len(first) == len(second) == count
    cotangent, x, w = first[0]
    assert cotangent.shape == x.shape == (toy_case.ROWS, toy_case.WIDTH)
    assert w.shape == (toy_case.WIDTH,) * 2
    arrays = [array for arguments in (*first, *second) for array in arguments]
    assert len({float(jnp.sum(a, dtype=jnp.float32)) for a in arrays}) == 2 * count * 3
    if target is not None:
        assert sum(array.nbytes for arguments in first for array in arguments) >= target.l2


def test_errors_are_relative_to_the_root_mean_square() -> None:
    expected = np.array([3.0, -4.0, 0.0, 5.0])  # its root mean square is √12.5
    found = harness.errors(expected + np.array([0, 0.5, 0, -0.1]), expected)
    assert found["max"] == pytest.approx(0.5 / math.sqrt(12.5))
    assert found["rms"] == pytest.approx(math.sqrt(0.26 / 4 / 12.5))
    assert harness.errors([0.0, 2.0], [0.0, 0.0]) == {"max": 2, "rms": math.sqrt(2)}


def test_rows_of_the_table() -> None:
    rows = bench.run_table([("toys", toy_case.CASE)], rounds=2, say=print)
    forward, backward, *others = rows
    assert (forward["implementation"], forward["pass"]) == ("xla", "forward")
    assert backward["pass"] == "forward_backward"
    low, high = forward["quartiles_us"]
    assert 0 < low <= forward["median_us"] <= high
    assert 1e-4 < forward["error"]["rms"] < 4e-3  # of bfloat16
    assert forward["error"]["max"] >= forward["error"]["rms"]
    reason = "pallas_triton serves NVIDIA GPUs; the device is cpu"
    assert [row["cannot_serve"] for row in others] == [reason, reason]
    json.dumps(rows, allow_nan=False)


def test_wrong_results_show_beside_the_time() -> None:
    """Half of the output's columns are zero: errors of about √½."""

    def halved(x: jax.Array, w: jax.Array, *, implementation: str) -> jax.Array:
        y = x @ w
        return y * (jnp.arange(toy_case.WIDTH) % 2)[None, :] if implementation == "broken" else y

    case = dataclasses.replace(toy_case.CASE, run=halved, implementations=("broken",))
    forward, backward = bench.run_table([("toys", case)], rounds=1, say=print)
    assert 0.6 < forward["error"]["rms"] < 0.8 and 0.6 < backward["gradient_error"]["rms"] < 0.8


def test_what_fails_is_said_and_the_rest_goes_on() -> None:
    def run(x: jax.Array, w: jax.Array, *, implementation: str) -> jax.Array:
        if implementation == "broken":
            raise RuntimeError("out of luck\nand more")
        return x @ w

    case = dataclasses.replace(toy_case.CASE, run=run, implementations=("broken", "xla"))
    lines: list[str] = []
    rows = bench.run_table([("toys", case)], rounds=1, say=lines.append)
    assert [row.get("failed") for row in rows] == ["RuntimeError: out of luck"] * 2 + [None] * 2
    assert lines[1].startswith(
        "| toys toy | forward | broken | failed | RuntimeError: out of luck |"
    )


def test_the_limit_stands_beside_the_time() -> None:
    target = dataclasses.replace(H100, l2=2**18)
    row = bench.bench_row(toy_case.CASE, "xla", "forward", target, rounds=1)
    moved = 2 * toy_case.ROWS * toy_case.WIDTH * 2
    assert row["limit_us"] == pytest.approx(1e6 * moved / 3.35232e12)
    assert row["of_limit"] == pytest.approx(row["limit_us"] / row["median_us"])


def test_large_cases_are_left_out_on_a_host_processor() -> None:
    lines: list[str] = []
    large = next(case for case in specs.CASES if case.name == "golf_baseline")
    assert bench.run_table([("xsa", large)], rounds=1, say=lines.append) == []
    assert lines[1:] == ["xsa golf_baseline: left out: 128 MiB are too many for a CPU"]


def test_markdown() -> None:
    timed: dict[str, Any] = {
        **TITLE,
        "implementation": "cudnn",
        "median_us": 1234.56,
        "quartiles_us": [1200.0, 1300.0],
        "host_bound": True,
        "limit_us": 400.0,
        "of_limit": 0.324,
        "gradient_error": {"rms": 2e-3, "max": 0.05},
    }
    refused = {**TITLE, "implementation": "pallas_triton", "cannot_serve": "the device is cpu"}
    device = {"device": "NVIDIA H200", "jax": "0.10.2", "platform_version": "cuda 13000"}
    text = bench.format_markdown({**device, "rows": [timed, refused]})
    assert text.startswith("Device: NVIDIA H200; jax 0.10.2; cuda 13000.\n")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    title = "| xsa golf | forward + backward |"
    times = "≤ 1,234.6 | 1,200.0 to 1,300.0 | 400.0 | 32%"
    assert table[2] == f"{title} cudnn | {times} | 2.0e-03 | 5.0e-02 |"
    assert table[3].startswith(f"{title} pallas_triton | cannot serve | the device is cpu |")


def test_neighbours_change_one_size() -> None:
    forward = {"queries": 64, "num_warps": 16, "num_stages": 1}
    config: dict[str, Any] = {"forward": forward, "bias_lanes": 512}
    changes = {"queries": 128}, {"queries": 32}, {"num_warps": 8}, {"num_stages": 2}
    assert list(tune.neighbours(config)) == [
        *({**config, "forward": {**forward, **change}} for change in changes),
        {**config, "bias_lanes": 256},
    ]


def test_the_search_finds_the_fastest_on_its_way() -> None:
    tried: list[tuple[int, int]] = []

    def seconds(config: dict[str, Any]) -> float:
        tokens, warps = config["tokens"], config["num_warps"]
        tried.append((tokens, warps))
        far = abs(math.log2(tokens / 32)) + abs(math.log2(warps / 8))
        return math.inf if tokens * warps > 256 else 1 + far

    best, least = tune.search({"tokens": 4, "num_warps": 4}, seconds)
    assert best == {"tokens": 32, "num_warps": 8} and least == 1
    assert len(tried) == len(set(tried)) < 20


def test_noise_is_no_gain() -> None:
    found = tune.search({"tokens": 4}, lambda config: 1 - 0.001 * config["tokens"] / 4)
    assert found == ({"tokens": 4}, 0.999)


def test_kernels_ask_for_the_entry_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = type("package", (), {"__path__": [str(tmp_path)]})
    case = next(case for case in specs.CASES if case.name == "quickstart")
    with dispatch.targeting(H100.device):
        key = tune.table_key("xsa", case)
    config = tune.heuristic("xsa", case)
    monkeypatch.setitem(sys.modules, "sngpt_kernels.xsa", package)
    for name in ("another", key):
        path = tune.write_entry("xsa", H100.kind, name, {"config": config})
    assert path == tmp_path / "tuned" / "nvidia_h100_80gb_hbm3.json"
    monkeypatch.setattr(dispatch.resources, "files", lambda name: tmp_path)
    table = dispatch.tuned.__wrapped__("sngpt_kernels.xsa", H100.kind)
    assert table == {"another": {"config": config}, key: {"config": config}}


def test_a_trial_stands_in_for_the_table() -> None:
    with tune.trying("xsa", {"queries": 16}) as trial:
        entry = dispatch.tuned("sngpt_kernels.xsa", H100.kind).get("float32_h64", {})
        assert entry == {"config": {"queries": 16}}
        assert dispatch.tuned("sngpt_kernels.cayley", H100.kind) == {}
    assert trial.asked == {"float32_h64"} and dispatch.tuned("sngpt_kernels.xsa", H100.kind) == {}


def test_without_a_gpu_nothing_is_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.tune_all([("xsa", specs.CASES[0])]) == {}
    reason = "not tuned: pallas_triton serves NVIDIA GPUs; the device is cpu"
    assert capsys.readouterr().err == f"xsa {specs.CASES[0].name}: {reason}\n"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.md"
    options = ["--case", "quickstart", "--quick", "--json", "--markdown", str(table)]
    assert command.main(["kernels", "xsa", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["device"], report["platform"]) == ("cpu", "cpu")
    timed = [row for row in report["rows"] if "median_us" in row]
    assert [row["pass"] for row in timed] == ["forward", "forward_backward"]
    assert report["rows"][0]["error"]["rms"] < 1e-5
    assert len(table.read_text().splitlines()) == 5 + 2 + len(report["rows"])
    with pytest.raises(UserError, match="there is no operation 'xas'"):
        command.main(["kernels", "xas"])
    with pytest.raises(UserError, match=f"--json {tmp_path}: cannot be written: it is a folder"):
        command.main(["kernels", "--json", str(tmp_path)])


@pytest.mark.parametrize("name", command.NAMES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([name, "--help"])
    assert caught.value.code == 0 and "--json" in capsys.readouterr().out
