"""The command on a trained run, and the other commands on its artifact."""

import json
import os
import re
import shutil
from dataclasses import asdict

import jax
import numpy as np
import pytest
import safetensors.numpy

import sngpt_jax
from sngpt_jax import evaluate, export, interop, sample
from sngpt_jax.artifact import bundle
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.quantize import dequantize
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.evaluation.bpb import score_validation
from sngpt_jax.weights import exporter
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.trained_model import from_artifact, tokenizer_beside
from tests import tiny_run

pytestmark = pytest.mark.slow
TOKENS = ["--tokens", "2048"]
STORAGE = artifact.Storage(False, "zstd", 1)


def run_export(run, out, *options, status=0):
    """The result of the command in this process."""
    arguments = ["--run", run, "--out", out, *TOKENS, "--json", out.with_suffix(".json"), *options]
    assert export.main([str(x) for x in arguments]) == status
    return json.loads(out.with_suffix(".json").read_text())


def json_of(main, capsys, *arguments):
    """The object that a command prints."""
    capsys.readouterr()
    assert main([str(x) for x in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def exported(tiny_trained, tmp_path_factory):
    """An artifact with its figures, scored by the program with this process's devices and way of
    compiling.
    """
    out = tmp_path_factory.mktemp("artifact") / "model.sngpt"
    options = ["--limit", "16000000", "--export.mlp-bits", "5", "--export.codec", "zstd"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", tiny_run.environment(len(jax.devices()))["XLA_FLAGS"])
        return out, run_export(tiny_trained, out, *options)


@pytest.fixture
def scored_here(monkeypatch):
    """This process, which has compiled the step, scores instead of the program."""

    def run(program, path, data=None, tokens=0, progress=None):
        mesh = make_mesh()
        model = from_artifact(path, mesh)
        if data is None:
            return {}
        dataset = model.open_data(data)
        return asdict(score_validation(model.config, model.variables, dataset, mesh, tokens))

    monkeypatch.setattr(bundle, "run", run)


def test_every_byte_is_accounted_for(exported):
    out, result = exported
    program = out.with_suffix(".pyz")
    assert result["artifact_bytes"] == out.stat().st_size
    assert result["code_bytes"] == program.stat().st_size == len(bundle.build().data)
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert result["fits"] and result["limit"] == 16_000_000
    groups = result["bits_per_weight"]
    payload = sum(group["bytes"] for group in groups.values())
    assert payload + result["header_bytes"] == result["artifact_bytes"]
    assert sum(group["weights"] for group in groups.values()) == result["parameters"]
    widths = {"attention": "int8", "control": "float32", "embed": "int8", "mlp": "int5"}
    assert {name: group["width"] for name, group in groups.items()} == widths
    for group in groups.values():
        assert group["coded"] == pytest.approx(8 * group["bytes"] / group["weights"])
        assert group["entropy"] is None or 0 < group["entropy"] < group["coded"]
    assert "sngpt_jax/score_artifact.py" in result["program_files"]
    assert "numpy" in result["libraries"]


def test_evaluate_gives_the_scores_of_the_export(exported, tiny_trained, capsys):
    """The run on the grid of the export has the artifact's score."""
    out, result = exported
    scored = json_of(evaluate.main, capsys, "--artifact", out, *TOKENS)["bpb"]
    assert scored == pytest.approx(result["score"]["bpb_after"], rel=1e-9)
    run = json_of(evaluate.main, capsys, "--run", tiny_trained, *TOKENS)["bpb"]
    assert run == pytest.approx(result["score"]["bpb_before"], rel=1e-9)
    assert result["score"]["gap"] == pytest.approx(scored - run, abs=1e-9) != 0
    assert result["score"]["tokens"] == 2048
    grid = ["--fake-quantize", "--export.mlp-bits", "5"]
    imitated = json_of(evaluate.main, capsys, "--run", tiny_trained, *TOKENS, *grid)["bpb"]
    assert imitated == pytest.approx(scored, rel=1e-9)


def test_sample_and_interop_read_it(exported, tmp_path, capsys):
    out, _ = exported
    arguments = ["--artifact", out, "--prompt", "ab", "--max-tokens", "8"]
    (drawn,) = json_of(sample.main, capsys, *arguments)["samples"]
    assert drawn["text"].startswith("ab")
    theirs = tmp_path / "model.safetensors"
    assert interop.main(["export", "--artifact", str(out), "--out", str(theirs)]) == 0
    found = safetensors.numpy.load_file(theirs)["blocks.1.mlp.fc.weight"]
    expected = dequantize(artifact.read(out).tensors["blocks/1/mlp/up"])
    np.testing.assert_array_equal(found, expected.T)


def test_without_its_tokenizer_it_is_scored_and_not_sampled(exported, tmp_path):
    moved = tmp_path / "alone.sngpt"
    shutil.copy(exported[0], moved)
    with pytest.raises(UserError, match=r"keeps no tokenizer; put .*alone\.tokenizer\.\*, beside"):
        sample.main(["--artifact", str(moved)])
    assert evaluate.main(["--artifact", str(moved), *TOKENS]) == 0
    tokenizer = tokenizer_beside(exported[0], ".model")
    tokenizer_beside(moved, ".model").write_bytes(tokenizer.read_bytes() + b"\x00")
    with pytest.raises(UserError):
        sample.main(["--artifact", str(moved)])


@pytest.mark.usefixtures("scored_here")
def test_over_the_limit_is_exit_status_4_with_the_table(tiny_trained, tmp_path, capsys):
    out = tmp_path / "model.sngpt"
    run_export(tiny_trained, out, "--limit", "30000", "--no-score", status=4)
    printed, said = capsys.readouterr()
    assert "over the limit of 30,000" in printed and re.search(r"attention +int8", printed)
    assert said.strip().splitlines()[-1].startswith(f"error: {out} is ")
    assert "bits/byte" not in printed
    assert "sngpt_jax/score_artifact.py" in printed and "libraries\n  chex, " in printed
    assert out.exists(), "the artifact can be inspected"


@pytest.mark.usefixtures("scored_here")
def test_tune_to_fit_finds_a_policy_under_the_limit(tiny_trained, tmp_path, capsys):
    limit = len(bundle.build().data) + 19_000
    out = tmp_path / "model.sngpt"
    result = run_export(tiny_trained, out, "--limit", limit, "--tune-to-fit", "--no-score")
    said = capsys.readouterr().err
    assert said.count("rel. MSE") >= 10 and "too many" in said
    assert result["fits"] and result["total_bytes"] > limit - 1500, "near the limit, not far below"
    assert result["policy"]["codec"] == "rans"
    assert artifact.read(out).metadata["config"]["export"] == result["policy"]


@pytest.mark.usefixtures("scored_here")
def test_the_runs_own_policy_is_the_default(tiny_trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_trained, run)
    config = json.loads((run / "config.json").read_text())
    config["export"] |= {"mlp_bits": 5, "packed": True, "codec": "lzma", "codec_level": 1}
    (run / "config.json").write_text(json.dumps(config))
    options = ["--step", "10", "--weights", "ema", "--no-score"]
    options += ["--export.gptq", "True", "--export.gptq-tokens", "4096"]
    result = run_export(run, tmp_path / "model.sngpt", *options)
    groups = result["bits_per_weight"]
    assert groups["mlp"]["width"] == "int5"
    assert groups["mlp"]["packing_loss"] != 0 == groups["attention"]["packing_loss"]
    assert (result["step"], result["weights"]) == (10, "ema") and "score" not in result
    content = artifact.read(tmp_path / "model.sngpt")
    assert content.storage.packed and content.metadata["version"] == sngpt_jax.__version__
    ema = load_model(run, make_mesh(jax.devices()[:1]), 10, "ema").variables
    ema = ema["blocks"][0]["mlp"]["up"]
    error = np.abs(dequantize(content.tensors["blocks/0/mlp/up"]) - ema)
    assert 0 < error.mean() < 0.05 * np.abs(ema).mean() * 2
    assert not list(tmp_path.glob(".export-*"))


def test_verification_sees_a_sign_a_missing_and_an_extra_tensor(tmp_path):
    path, zeros = tmp_path / "m.sngpt", np.zeros(3, np.float32)
    good = {"a": zeros, "b": zeros}
    path.write_bytes(artifact.encode({}, good, STORAGE).data)
    exporter.verify(path, good)
    for other, named in (
        ({**good, "b": -zeros}, "b"),
        ({"a": zeros}, "b"),
        ({**good, "c": zeros}, "c"),
    ):
        with pytest.raises(RuntimeError, match=f"does not hold what was exported: {named}"):
            exporter.verify(path, other)


def test_nothing_appears_before_the_program_has_run(tmp_path, monkeypatch):
    """A killed export's rest goes. Meanwhile another export to this file is refused."""
    tensors = {"a": np.zeros(3, np.float32)}
    data = artifact.encode({}, tensors, STORAGE).data
    files = {tmp_path / "m.sngpt": data, tmp_path / "m.pyz": b""}
    (tmp_path / ".export-m").mkdir()
    (tmp_path / ".export-m" / "m.sngpt").write_bytes(b"half")

    def fail(*arguments):
        assert not list(tmp_path.glob("*.sngpt")), "still hidden"
        with pytest.raises(UserError, match="another process exports to it"):
            exporter.publish(files, tensors, None, 0)
        raise UserError("the program fails")

    monkeypatch.setattr(bundle, "run", fail)
    with pytest.raises(UserError, match="the program fails"):
        exporter.publish(files, tensors, None, 0)
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed(tmp_path, monkeypatch):
    tensors = {"a": np.zeros(3, np.float32)}
    data = artifact.encode({}, tensors, STORAGE).data
    link, target = tmp_path / "m.sngpt", tmp_path / "elsewhere" / "target"
    link.symlink_to(target)
    monkeypatch.setattr(bundle, "run", lambda *_: {})
    exporter.publish({link: data, tmp_path / "m.pyz": b"program"}, tensors, None, 0)
    assert link.is_symlink() and target.read_bytes() == data
    assert (tmp_path / "m.pyz").read_bytes() == b"program" and not list(tmp_path.glob(".export*"))


def test_a_pipe_is_refused_and_stays(tiny_trained, tmp_path):
    pipe = tmp_path / "m.sngpt"
    os.mkfifo(pipe)
    refused(export.main, OUT, "is a pipe or a device", run=tiny_trained, tmp=tmp_path)
    assert pipe.is_fifo()


@pytest.mark.usefixtures("scored_here")
def test_gptq_reads_training_text_alone_and_lowers_the_gap(tiny_trained, tmp_path):
    bits = ["--export.mlp-bits", "3", "--export.attention-bits", "3"]
    gptq = ["--export.gptq", "True", "--export.gptq-tokens", "4096"]
    near = run_export(tiny_trained, tmp_path / "near.sngpt", *bits)
    better = run_export(tiny_trained, tmp_path / "better.sngpt", *bits, *gptq)
    assert better["score"]["bpb_before"] == near["score"]["bpb_before"]
    assert better["score"]["gap"] < near["score"]["gap"]
    data = json.loads((tiny_trained / "config.json").read_text())["data"]["dir"]
    swapped, out = tmp_path / "swapped", tmp_path / "refused.sngpt"
    shutil.copytree(data, swapped)
    manifest = json.loads((swapped / "manifest.json").read_text())
    changed = json.dumps({**manifest, "train": manifest["val"]})
    (swapped / "manifest.json").write_text(changed)
    with pytest.raises(UserError):
        run_export(tiny_trained, out, "--data", swapped, *gptq)
    assert not out.exists()


def refused(main, arguments, said, **names):
    """The command ends in one line that says `said`."""
    with pytest.raises(UserError, match=said.format(**names)) as caught:
        main([argument.format(**names) for argument in arguments])
    assert "\n" not in str(caught.value)


OUT = ["--run", "{run}", "--out", "{tmp}/m.sngpt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "{run}", "--out", "{tmp}/model.bin"], r"expected a file named \*.sngpt"),
        (["--run", "{run}", "--out", "/proc/m.sngpt"], "cannot be written"),
        (["--run", "{tmp}", "--out", "{tmp}/m.sngpt"], "not a run directory"),
        ([*OUT, "--tune-to-fit"], "--tune-to-fit needs --limit"),
        ([*OUT, "--limit", "-1"], "--limit and --tokens are 0 or more"),
        ([*OUT, "--json", "{tmp}/m.sngpt"], "is written by --out"),
        ([*OUT, "--json", "{tmp}"], "--json {tmp}: cannot be written"),
        ([*OUT, "--export.packed", "True"], "export.packed = True leaves no codes"),
        ([*OUT, "--data", "{tmp}"], "{tmp}"),
        ([*OUT, "--limit", "1000", "--tune-to-fit", "--no-score"], "less than the program alone"),
    ],
)
def test_mistakes_are_refused(tiny_trained, tmp_path, arguments, said):
    refused(export.main, arguments, said, run=tiny_trained, tmp=tmp_path)
    assert not list(tmp_path.glob("*.sngpt"))


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (evaluate.main, ["--artifact", "{out}", "--run", "{run}"], "give either --run"),
        (evaluate.main, [], "give either --run"),
        (evaluate.main, ["--artifact", "{out}", "--step", "3"], "holds one set of weights"),
        (evaluate.main, ["--artifact", "{out}", "--fake-quantize"], "already quantized"),
        (evaluate.main, ["--artifact", "{tmp}/none.sngpt"], "none.sngpt: cannot be read"),
        (evaluate.main, ["--artifact", "{tmp}/half.sngpt"], "half.sngpt: truncated"),
        (sample.main, ["--artifact", "{tmp}/half.sngpt"], "half.sngpt: truncated"),
        (interop.main, ["export", "--out", "{tmp}/x.safetensors"], "give either --run"),
    ],
)
def test_mistakes_with_artifacts_are_refused(
    exported, tiny_trained, tmp_path, main, arguments, said
):
    content = exported[0].read_bytes()
    (tmp_path / "half.sngpt").write_bytes(content[: len(content) // 2])
    refused(main, arguments, said, run=tiny_trained, tmp=tmp_path, out=exported[0])
