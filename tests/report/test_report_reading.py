"""Run directories in any state, read for a report."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sngpt_jax.artifact.account import GroupReport, as_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.evaluation.bpb import Score
from sngpt_jax.report.reading import make_series, number, read_run
from tests import fake_run

GROUP = GroupReport("mlp", "int8", 4, 1000, 990.0, 7.5, 7.9, 0.1, 0.0, 3e-5)


def test_a_run_is_read(tmp_path):
    run = read_run(fake_run.make(tmp_path / "run", seed=3, levels=2))
    assert run.last_step == 40 and run.skipped == 0
    assert run.config["train.seed"] == 3 and run.config["model.d_model"] == 512
    loss = run.series["train_loss"]
    np.testing.assert_array_equal(loss.steps, np.arange(1, 41))
    np.testing.assert_array_equal(loss.values, [fake_run.loss(step, 3) for step in range(1, 41)])
    np.testing.assert_array_equal(run.series["val_bpb"].steps, [0, 10, 20, 30, 40])
    assert "code/layer01/level1/dead" in run.series
    assert run.summary["val_bpb"] == fake_run.loss(40, 3) / 2
    assert [start["jax"] for start in run.starts] == ["0.10.2"]


def test_what_is_no_number_is_none():
    assert number(3) == 3 and number(True) == 1
    for value in (None, "3", [], math.nan, math.inf, 10**400, 2e38, -1e300):
        assert math.isnan(number(value))


def test_series_hold_what_was_a_number():
    records = [
        {"step": 3, "loss": 1.0, "name": "x", "qat": True},
        {"step": 1, "loss": None},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": 5, "other": 10**400},
    ]
    found = make_series([*records, *({"step": x, "loss": 9.0} for x in (math.nan, -1, 1e300))])
    np.testing.assert_array_equal(found["loss"].steps, [1, 2, 3])
    np.testing.assert_array_equal(found["loss"].values, [np.nan, np.nan, 5])
    np.testing.assert_array_equal(found["other"].values, [np.nan])
    assert found.keys() == {"loss", "qat", "other"}


@pytest.mark.parametrize(
    "bad", ["{", "[1]", "null", '{"loss": 1}', '{"step": "x"}', "[" * 100_000, "\0"], ids=range(7)
)
def test_lines_that_are_no_records_are_left_out(tmp_path, bad):
    directory = fake_run.make(tmp_path / "run")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    lines = [*lines[:5], bad, *lines[5:], '{"step": 41, "train_lo']
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(directory)
    assert run.skipped == 1  # the torn last line is no fault
    assert run.last_step == 40 and len(run.series["train_loss"].steps) == 40


def test_nulls_are_gaps_and_nan_is_no_json(tmp_path):
    directory = fake_run.make(tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train_loss": null}\n{"step": 42, "train_loss": NaN}\n')
        file.write('{"step": 43, "lr": 0.5}\n')
    run = read_run(directory)
    assert run.last_step == 43 and run.skipped == 1
    np.testing.assert_array_equal(run.series["train_loss"].steps[-2:], [40, 41])
    assert np.isnan(run.series["train_loss"].values[-1])


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: not a run directory \(no config.json\)"):
        read_run(tmp_path / "nowhere")
    directory = fake_run.make(tmp_path / "run")
    (directory / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"metrics.jsonl: holds no metrics yet; .*--live"):
        read_run(directory)
    assert read_run(directory, may_be_empty=True).series == {}
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read: No such file"):
        read_run(directory)
    assert read_run(directory, may_be_empty=True).last_step == 0
    (directory / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read as JSON"):
        read_run(directory)


def test_results_are_known_by_their_keys(tmp_path):
    directory = fake_run.make(tmp_path / "run")
    export = {"artifact_bytes": 1, "bits_per_weight": as_json([GROUP])}
    counts = {"byte_count": "text", "text_bytes": 5, "golf_bytes": 5}
    known = Score(loss=3.0, bpb=1.5, bytes=5, tokens=2, lost=0.0, lossy_documents=0, **counts)
    score = {**vars(known), "mode": "standard"}
    tasks = {"step": 1, "weights": "final", "tasks": {"lambada": {"acc": 0.5}}}
    files = {"b": export, "score": score, "tasks": tasks, "plan": {"bpb": 1}, "list": [1]}
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    (directory / "torn.json").write_text('{"artifact_bytes"')
    (directory / "tokenizer.json").write_text(json.dumps(export))
    run = read_run(directory)
    assert run.exports == [("b.json", export)]
    assert run.evaluations == [("score.json", score), ("tasks.json", tasks)]
    assert dataclasses.asdict(GROUP) in export["bits_per_weight"].values()


def test_starts_survive_a_torn_line(tmp_path):
    directory = fake_run.make(tmp_path / "run")
    (directory / "environment.jsonl").write_text('{"jax": "1"}\n[]\n{"ja\n{"jax": "2"}\n')
    assert [start["jax"] for start in read_run(directory).starts] == ["1", "2"]
    (directory / "environment.jsonl").unlink()
    assert read_run(directory).starts == []
