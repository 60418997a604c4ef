"""A whole run of a model with sparse codes: killed and resumed, and scored by its commands."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from sngpt_jax import evaluate, sample
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.model.forward import init_variables, join, losses
from sngpt_jax.run.metrics import read_metrics
from sngpt_jax.weights.source import load_model
from tests import tiny_run

pytestmark = pytest.mark.slow

CODED = [
    *("--model.family", "pre_norm", "--model.positions", "learned", "--model.qk-norm", "False"),
    *("--model.mlp-activation", "gelu", "--model.levels", "5,4,0;7,8,16;8,8,8"),
    *("--eval.health-tokens", "500"),
]


@pytest.fixture(scope="module")
def trained(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("coded") / "run"
    done = tiny_run.run("train", "--config", tiny_recipe, "--run-dir", directory, *CODED)
    assert done.returncode == 0, done.stderr
    return directory


def logged(directory: Path) -> list[dict[str, float]]:
    """Everything in the metrics but times."""
    times = ("seconds", "step_ms", "tok_per_s")
    records = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in record.items() if not k.endswith(times)} for record in records]


@pytest.mark.full
def test_a_killed_run_resumes_bit_for_bit(tiny_recipe, trained, tmp_path):
    command = ("train", "--config", tiny_recipe, "--run-dir", tmp_path, *CODED)
    process = tiny_run.start(*command)
    tiny_run.wait_for(process, tmp_path / "checkpoints" / "00000010.json")
    process.kill()
    process.communicate()
    assert not (tmp_path / "summary.json").exists(), "it was finished before it could be killed"
    done = tiny_run.run(*command)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 10" in done.stdout
    tiny_run.assert_same_run(trained, tmp_path)
    assert logged(trained) == logged(tmp_path)


def test_every_validation_logs_the_health_of_every_layer_and_level(trained):
    found = {record["step"]: record for record in logged(trained) if "code/tokens" in record}
    assert list(found) == [0, 10, 20]
    of_levels = ["reachable", "dead", "silent", "zombies", "mu_mean", "sigma_mean", "min_z"]
    of_levels.append("duplicates")
    names = [f"level{level}/{name}" for level in range(3) for name in of_levels]
    names += ["cos", "cos_centered", "rms"]
    keys = {f"code/layer0{layer}/{name}" for layer in range(2) for name in names}
    for record in found.values():
        assert keys <= record.keys()
        assert record["code/tokens"] == 480  # whole windows of 32
        reachable = [record[f"code/layer00/level{level}/reachable"] for level in range(3)]
        assert reachable == [32, 96, 96]
    assert found[0]["code/level0/sigma_mean"] == 1 != found[20]["code/level0/sigma_mean"]


def test_commands_score_what_the_run_scored(trained, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    for weights in ("final", "swa", "ema"):
        arguments = ["--run", str(trained), "--weights", weights, "--tokens", "2048", "--json"]
        assert evaluate.main(arguments) == 0
        wanted = summary["val_bpb" if weights == "final" else f"{weights}_val_bpb"]
        assert json.loads(capsys.readouterr().out)["bpb"] == pytest.approx(wanted, rel=1e-6)
    assert sample.main(["--run", str(trained), "--prompt", "abc", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("abc")


def test_the_scores_are_with_the_statistics_of_the_run(trained):
    """With the statistics of the start the same weights score otherwise."""
    model = load_model(trained, make_mesh(jax.devices()[:1]))
    config = model.config.model
    tokens = np.random.default_rng(0).integers(0, 300, (4, 33))
    fresh = join(tiny_run.final_state(trained).params, init_variables(config, jax.random.key(0))[1])
    score = jax.jit(losses(config))
    own, other = (score(v, tokens[:, :-1], tokens[:, 1:]) for v in (model.variables, fresh))
    assert np.abs(own - other).mean() > 1e-3
