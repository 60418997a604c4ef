"""The command on a trained run: what it writes, what it says of it, and that the other commands
read it.
"""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import sngpt_jax
from sngpt_jax import export as export_command
from sngpt_jax.artifact import bundle
from sngpt_jax.artifact import file as artifact
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh, path_name
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import from_artifact, tokenizer_beside
from tests import tiny_run

pytestmark = pytest.mark.slow
TOKENS = ["--tokens", "2048"]


def export(run, out, *options, status=0):
    done = tiny_run.run("export", "--run", run, "--out", out, *TOKENS, "--json", *options)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout), done


@pytest.fixture(scope="module")
def exported(tiny_trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "model.sngpt"
    result, _ = export(
        tiny_trained, out, "--limit", "16000000", "--export.mlp-bits", "5", "--export.codec", "zstd"
    )
    return out, result


def test_every_byte_is_accounted_for(exported):
    out, result = exported
    program = out.with_suffix(".pyz")
    assert result["artifact_bytes"] == out.stat().st_size
    assert result["code_bytes"] == program.stat().st_size == len(bundle.build().data)
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert result["fits"] and result["limit"] == 16_000_000
    groups = result["bits_per_weight"]
    assert (
        sum(group["bytes"] for group in groups.values()) + result["header_bytes"]
        == result["artifact_bytes"]
    )
    assert sum(group["weights"] for group in groups.values()) == result["parameters"]
    assert {name: group["width"] for name, group in groups.items()} == {
        "attention": "int8",
        "control": "float32",
        "embed": "int8",
        "mlp": "int5",
    }
    for group in groups.values():
        assert group["coded"] == pytest.approx(8 * group["bytes"] / group["weights"])
        assert group["entropy"] is None or 0 < group["entropy"] < group["coded"]
    assert (
        "sngpt_jax/score_artifact.py" in result["program_files"] and "numpy" in result["libraries"]
    )


def test_the_artifact_holds_the_run_quantized(exported, tiny_trained):
    """Each matrix on its grid, at most half a step from the run's; gains as they are."""
    out, _ = exported
    content = artifact.read(out)
    mesh = make_mesh(jax.devices()[:1])
    model = load_model(tiny_trained, mesh)
    found = from_artifact(out, mesh)
    before, after = (
        {
            path_name(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(m.variables)
        }
        for m in (model, found)
    )
    assert before.keys() == after.keys() == content.tensors.keys()
    for name, tensor in before.items():
        stored = content.tensors[name]
        if isinstance(stored, np.ndarray):
            np.testing.assert_array_equal(after[name], tensor)
            continue
        steps = stored.scales.astype(np.float64)
        steps = steps if stored.transposed else steps[:, None]
        assert (np.abs(after[name] - tensor) <= steps / 2 * (1 + 1e-5)).all(), name
        assert not np.array_equal(after[name], tensor)
    assert (found.step, found.weights, found.config.model) == (20, "final", model.config.model)
    assert found.config.export.mlp_bits == 5, "the policy that was used"


def test_evaluate_gives_the_score_that_export_printed(exported, tiny_trained):
    out, result = exported
    done = tiny_run.run("evaluate", "--artifact", out, *TOKENS, "--json")
    assert done.returncode == 0, done.stderr
    scored = json.loads(done.stdout)
    assert scored["bpb"] == pytest.approx(result["score"]["bpb_after"], rel=1e-9)
    run = json.loads(tiny_run.run("evaluate", "--run", tiny_trained, *TOKENS, "--json").stdout)
    assert run["bpb"] == pytest.approx(result["score"]["bpb_before"], rel=1e-9)
    assert result["score"]["gap"] == pytest.approx(scored["bpb"] - run["bpb"], abs=1e-9) != 0
    assert result["score"]["tokens"] == 2048
    imitated = tiny_run.run(
        "evaluate",
        "--run",
        tiny_trained,
        *TOKENS,
        "--fake-quantize",
        "--export.mlp-bits",
        "5",
        "--json",
    )
    assert json.loads(imitated.stdout)["bpb"] == pytest.approx(scored["bpb"], rel=1e-9)


def test_sample_and_interop_read_it(exported, tmp_path):
    out, _ = exported
    done = tiny_run.run(
        "sample", "--artifact", out, "--prompt", "ab", "--max-tokens", "8", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"].startswith("ab")
    done = tiny_run.run(
        "interop", "export", "--artifact", out, "--out", tmp_path / "model.safetensors"
    )
    assert done.returncode == 0, done.stderr
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")["blocks.1.mlp.fc.weight"]
    np.testing.assert_array_equal(
        theirs, artifact.read(out).tensors["blocks/1/mlp/up"].dequantize().T
    )


def test_without_its_tokenizer_it_is_scored_and_not_sampled(exported, tmp_path):
    moved = tmp_path / "alone.sngpt"
    shutil.copy(exported[0], moved)
    done = tiny_run.run("sample", "--artifact", moved)
    assert (
        done.returncode == 2
        and "keeps no tokenizer" in done.stderr
        and "alone.tokenizer.*" in done.stderr
    )
    assert tiny_run.run("evaluate", "--artifact", moved, *TOKENS).returncode == 0
    tokenizer = tokenizer_beside(exported[0], ".model")
    tokenizer_beside(moved, ".model").write_bytes(tokenizer.read_bytes() + b"\x00")
    done = tiny_run.run("sample", "--artifact", moved)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_over_the_limit_is_exit_status_4_with_the_table(tiny_trained, tmp_path):
    out = tmp_path / "model.sngpt"
    done = tiny_run.run(
        "export", "--run", tiny_trained, "--out", out, "--limit", "30000", "--no-score"
    )
    assert done.returncode == 4, done.stderr
    assert "over the limit of 30,000" in done.stdout and re.search(r"attention +int8", done.stdout)
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {out} is ")
    assert "bits/byte" not in done.stdout
    assert "sngpt_jax/score_artifact.py" in done.stdout and "to run with chex" in done.stdout, (
        "all that was counted"
    )
    assert out.exists(), "what was made is there to look at"


def test_tune_to_fit_finds_a_policy_under_the_limit(tiny_trained, tmp_path):
    program = len(bundle.build().data)
    limit = program + 19_000
    result, done = export(
        tiny_trained, tmp_path / "model.sngpt", "--limit", str(limit), "--tune-to-fit"
    )
    tried = [line for line in done.stderr.splitlines() if "rel. MSE" in line]
    assert result["fits"] and result["total_bytes"] > limit - 1500, "near the limit, not far below"
    assert len(tried) >= 10 and any("too many" in line for line in tried)
    fitting = [
        float(line.split("rel. MSE")[1].split()[0]) for line in tried if line.endswith("fits")
    ]
    assert min(fitting) > 0
    assert result["policy"]["codec"] == "rans"
    assert artifact.read(tmp_path / "model.sngpt").metadata["config"]["export"] == result["policy"]


def test_the_runs_own_policy_is_the_default(tiny_trained, tmp_path):
    """With a checkpoint, weights and GPTQ to choose, and no score."""
    run = tmp_path / "run"
    shutil.copytree(tiny_trained, run)
    config = json.loads((run / "config.json").read_text())
    config["export"] |= {"mlp_bits": 5, "packed": True, "codec": "lzma", "codec_level": 1}
    (run / "config.json").write_text(json.dumps(config))
    options = [
        "--step",
        "10",
        "--weights",
        "ema",
        "--no-score",
        "--export.gptq",
        "True",
        "--export.gptq-tokens",
        "4096",
    ]
    result, _ = export(run, tmp_path / "model.sngpt", *options)
    groups = result["bits_per_weight"]
    assert (
        groups["mlp"]["width"] == "int5"
        and groups["mlp"]["packing_loss"] != 0 == groups["attention"]["packing_loss"]
    )
    assert (result["step"], result["weights"]) == (10, "ema") and "score" not in result
    content = artifact.read(tmp_path / "model.sngpt")
    assert content.storage.packed and content.metadata["version"] == sngpt_jax.__version__
    ema = load_model(run, make_mesh(jax.devices()[:1]), 10, "ema").variables["blocks"][0]["mlp"][
        "up"
    ]
    error = np.abs(content.tensors["blocks/0/mlp/up"].dequantize() - ema)
    assert 0 < error.mean() < 0.05 * np.abs(ema).mean() * 2
    assert not list(tmp_path.glob(".export-*"))


def test_verification_sees_a_sign_a_missing_and_an_extra_tensor(tmp_path):
    path, zeros = tmp_path / "m.sngpt", np.zeros(3, np.float32)
    path.write_bytes(
        artifact.encode({}, {"a": zeros, "b": zeros}, artifact.Storage(False, "zstd", 1)).data
    )
    export_command.verify(path, {"a": zeros, "b": zeros})
    for other, named in (
        ({"a": zeros, "b": -zeros}, "b"),
        ({"a": zeros}, "b"),
        ({"a": zeros, "b": zeros, "c": zeros}, "c"),
    ):
        with pytest.raises(RuntimeError, match=f"does not hold what was exported: {named}"):
            export_command.verify(path, other)


def test_nothing_appears_before_the_program_has_run(tmp_path, monkeypatch):
    def fail(*arguments):
        assert not list(tmp_path.glob("*.sngpt")), "still hidden"
        raise UserError("the program fails")

    monkeypatch.setattr(bundle, "run", fail)
    tensors = {"a": np.zeros(3, np.float32)}
    data = artifact.encode({}, tensors, artifact.Storage(False, "zstd", 1)).data
    with pytest.raises(UserError, match="the program fails"):
        export_command.publish({"m.sngpt": data, "m.pyz": b""}, tmp_path, tensors, None, 0)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_deleted_and_one_at_work_is_not(tmp_path):
    (tmp_path / ".export-killed").mkdir()
    (tmp_path / ".export-killed" / "m.sngpt").write_bytes(b"half")
    with export_command._hidden(tmp_path) as first:
        assert list(tmp_path.iterdir()) == [first]
        with export_command._hidden(tmp_path) as second:
            assert set(tmp_path.iterdir()) == {first, second}
    assert not list(tmp_path.iterdir())


def test_gptq_reads_training_text_alone_and_lowers_the_gap(tiny_trained, tmp_path):
    options = ["--export.mlp-bits", "3", "--export.attention-bits", "3"]
    near, _ = export(tiny_trained, tmp_path / "near.sngpt", *options)
    better, _ = export(
        tiny_trained,
        tmp_path / "better.sngpt",
        *options,
        "--export.gptq",
        "True",
        "--export.gptq-tokens",
        "4096",
    )
    assert better["score"]["bpb_before"] == near["score"]["bpb_before"]
    assert better["score"]["gap"] < near["score"]["gap"]
    data = json.loads((tiny_trained / "config.json").read_text())["data"]["dir"]
    swapped = tmp_path / "swapped"
    shutil.copytree(data, swapped)
    manifest = json.loads((swapped / "manifest.json").read_text())
    manifest["train"] = manifest["val"]
    (swapped / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "refused.sngpt"
    done = tiny_run.run(
        "export",
        "--run",
        tiny_trained,
        "--out",
        out,
        "--data",
        swapped,
        "--export.gptq",
        "True",
        *TOKENS,
    )
    assert done.returncode == 2, done.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "{run}", "--out", "{tmp}/model.bin"], "expected a file named *.sngpt"),
        (
            ["--run", "{run}", "--out", "{tmp}/m.sngpt", "--tune-to-fit"],
            "--tune-to-fit needs --limit",
        ),
        (
            ["--run", "{run}", "--out", "{tmp}/m.sngpt", "--limit", "-1"],
            "--limit and --tokens are 0 or more",
        ),
        (
            ["--run", "{run}", "--out", "{tmp}/m.sngpt", "--json", "{tmp}/m.sngpt"],
            "is written by --out",
        ),
        (
            ["--run", "{run}", "--out", "{tmp}/m.sngpt", "--json", "{tmp}"],
            "--json {tmp}: cannot be written",
        ),
        (["--run", "{run}", "--out", "/proc/m.sngpt"], "cannot be written"),
        (["--run", "{tmp}", "--out", "{tmp}/m.sngpt"], "not a run directory"),
        (
            ["--run", "{run}", "--out", "{tmp}/m.sngpt", "--export.packed", "True"],
            "leaves export.codec = rans no codes",
        ),
        (["--run", "{run}", "--out", "{tmp}/m.sngpt", "--data", "{tmp}"], "{tmp}"),
        (
            [
                "--run",
                "{run}",
                "--out",
                "{tmp}/m.sngpt",
                "--limit",
                "1000",
                "--tune-to-fit",
                "--no-score",
            ],
            "less than the program alone",
        ),
    ],
)
def test_refuses_in_one_line(tiny_trained, tmp_path, arguments, said):
    done = tiny_run.run("export", *(a.format(run=tiny_trained, tmp=tmp_path) for a in arguments))
    assert done.returncode == 2, done.stderr
    assert said.format(tmp=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.sngpt"))


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("evaluate", ["--artifact", "{out}", "--run", "{run}"], "give either --run"),
        ("evaluate", [], "give either --run"),
        (
            "evaluate",
            ["--artifact", "{out}", "--step", "3"],
            "an artifact holds one set of weights",
        ),
        ("evaluate", ["--artifact", "{out}", "--fake-quantize"], "an artifact is quantized"),
        ("evaluate", ["--artifact", "{tmp}/none.sngpt"], "none.sngpt: cannot be read"),
        ("evaluate", ["--artifact", "{tmp}/half.sngpt"], "half.sngpt: "),
        ("sample", ["--artifact", "{tmp}/half.sngpt"], "half.sngpt: "),
        ("interop", ["export", "--out", "{tmp}/x.safetensors"], "give either --run"),
    ],
)
def test_what_reads_artifacts_refuses_in_one_line(
    exported, tiny_trained, tmp_path, command, arguments, said
):
    content = exported[0].read_bytes()
    (tmp_path / "half.sngpt").write_bytes(content[: len(content) // 2])
    done = tiny_run.run(
        command, *(a.format(run=tiny_trained, tmp=tmp_path, out=exported[0]) for a in arguments)
    )
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
