"""The report's tables and data."""

import json
import statistics
from dataclasses import replace

import numpy as np
import pytest

from sngpt_jax.report import tables
from sngpt_jax.report.page import page, report
from sngpt_jax.report.reading import Series, read_run
from tests import fake_run

HOSTILE = "</script><img src=x onerror=alert(1)>"


def made(directory, **settings):
    return read_run(fake_run.make(directory, **settings))


def runs_of(tmp_path):
    wide = made(tmp_path / "wide", model=fake_run.with_model(d_model=256), seed=9)
    return [wide, *(made(tmp_path / f"small_seed{seed}", seed=seed) for seed in (1, 2, 3))]


def cells(row):
    return [text for text, _ in row["cells"]]


def marks(row, kind):
    return [text for text, of in row["cells"] if kind in of.split()]


def test_a_group_has_a_row_of_its_statistics(tmp_path):
    table = report(runs_of(tmp_path), "now")["scores"]
    names = ["wide", "small", "small_seed1", "small_seed2", "small_seed3"]
    assert [row["cells"][0][0] for row in table["rows"]] == names
    places = [(0, 0), (1, None), (1, 1), (1, 2), (1, 3)]
    assert [(row["group"], row.get("run")) for row in table["rows"]] == places
    column = table["columns"].index("val BPB")
    scores = [fake_run.loss(40, seed) / 2 for seed in (1, 2, 3)]
    mean, sd = statistics.fmean(scores), statistics.stdev(scores)
    assert cells(table["rows"][1])[column] == f"{mean:.4f} ± {sd:.4f}"
    assert cells(table["rows"][1])[1:3] == ["3 runs", "mean ± sd, n = 3"]
    assert cells(table["rows"][3])[column] == f"{scores[1]:.4f}"
    best = min(mean, fake_run.loss(40, 9) / 2)
    found = [mark for row in table["rows"] for mark in marks(row, "best")]
    assert len(found) == 1 and found[0].startswith(f"{best:.4f}")
    assert "SWA BPB" not in table["columns"]  # no run has one


def test_only_scores_of_the_same_data_counted_alike_compete(tmp_path):
    """Two runs on each of two texts, one of an earlier version, and one that counts otherwise."""

    def widths():
        for number, key in enumerate(["a" * 12] * 2 + ["b" * 12] * 2 + [None, "a" * 12]):
            model = fake_run.with_model(d_model=64 * (number + 1))
            yield fake_run.make(tmp_path / f"r{number}", model=model, seed=number + 1, data=key)

    *_, last = directories = list(widths())
    summary = json.loads((last / "summary.json").read_text()) | {"val_byte_count": "text"}
    (last / "summary.json").write_text(json.dumps(summary | {"val_bpb": 0.1}))
    runs = [read_run(directory) for directory in directories]
    data = report(runs, "now")
    bpb = [fake_run.loss(40, seed) / 2 for seed in (1, 2, 3, 4)]
    best = {f"{min(bpb[:2]):.4f}", f"{min(bpb[2:]):.4f}"}
    assert {mark for row in data["scores"]["rows"] for mark in marks(row, "best")} == best
    a, b, other = (
        f"4,096 tokens of text ({letter * 12}), {count} bytes"
        for letter, count in (("a", "golf"), ("b", "golf"), ("a", "text"))
    )
    unknown, compared = data["notes"]
    assert unknown.startswith("BPB of r4: compared with no other")
    assert compared.endswith(f": r0, r1 on {a}; r2, r3 on {b}; r5 on {other}")
    column = data["scores"]["columns"].index("scored on")
    assert [cells(row)[column] for row in data["scores"]["rows"]] == [a, a, b, b, "–", other]
    assert report(runs[:2], "now")["notes"] == report(runs[4:5], "now")["notes"] == []


def test_statistics_are_of_finished_runs_only(tmp_path):
    runs = [
        made(tmp_path / name, seed=seed, finished=finished)
        for name, seed, finished in [("a1", 1, 1), ("a2", 2, 1), ("a3", 3, 0), ("a4", 2, 1)]
    ]
    table = report(runs, "now")["scores"]
    rows = table["rows"]
    # one did not finish, one repeats another
    assert cells(rows[0])[1:3] == ["4 runs, 3 seeds", "mean ± sd, n = 2"]
    assert cells(rows[3])[2] == "at step 40 of 40"
    so_far = dict(zip(table["columns"], cells(rows[3]), strict=True))
    assert so_far["val loss"] == f"{fake_run.loss(40, 3):.4f}"
    best = min(fake_run.loss(step, 3) for step in range(0, 41, 10))
    assert so_far["best val loss"] == f"{best:.4f}"
    expected = ("20,480", f"{40 * 2048:,}", "4.0s")
    assert (so_far["tok/s"], so_far["tokens"], so_far["training"]) == expected


def test_a_run_that_diverged_says_so(tmp_path):
    directory = fake_run.make(tmp_path / "run", finished=False)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "train_loss": null}\n')
    data = report([read_run(directory)], "now")
    assert cells(data["scores"]["rows"][0])[2] == "diverged at step 41"
    assert data["notes"] == ["run: 1 losses are not finite"]
    steps, values = (data["numbers"][i] for i in data["runs"][0]["curves"]["train_loss"]["raw"])
    assert (steps[-1], values[-1]) == (41, None)


def test_differing_fields_are_marked(tmp_path):
    runs = runs_of(tmp_path)
    data = report(runs, "now")
    found = {row["cells"][0][0]: row for row in data["differences"]["rows"]}
    assert found.keys() == {"model.d_model", "train.seed"}
    assert cells(found["model.d_model"])[1:] == ["256", "512"]
    assert marks(found["model.d_model"], "mark") == ["512"]
    assert cells(found["train.seed"])[1:] == ["9", "1, 2, 3"]
    assert len(data["configuration"]["rows"]) == len(runs[0].config)
    assert report(runs[1:], "now")["differences"]["rows"] == []


def test_a_field_that_a_run_does_not_have_differs():
    table = tables.side_by_side(["a", "b"], [{"x": "1"}, {"x": "1", "y": "2"}], only_differing=True)
    assert [cells(row) for row in table["rows"]] == [["y", "–", "2"]]


def test_environments_tell_what_changed_between_starts(tmp_path):
    directory = fake_run.make(tmp_path / "run")
    again = {"step": 20, "time": "later", "jax": "0.12.0"}
    again["commit"] = "0123456789abcdef0123+changes"
    with (directory / "environment.jsonl").open("a") as file:
        file.write(json.dumps(again))
    rows = tables.environment_table([read_run(directory)])["rows"]
    found = dict(cells(row) for row in rows)
    assert found["starts"] == "2" and found["jax"] == "0.10.2 → 0.12.0"
    assert found["started after step"] == "20" and found["started at"] == "later"
    assert found["commit"] == "0123456789ab+changes"


def test_exports_and_evaluations_are_tables(tmp_path):
    directory = fake_run.make(tmp_path / "run")
    group = {"group": "mlp", "width": "int8", "bytes": 990.0, "entropy": None}
    export = {"artifact_bytes": 1000, "code_bytes": 234, "total_bytes": 1234, "limit": 1200}
    export |= {"fits": False, "bits_per_weight": {"mlp": group}}
    export["score"] = {"bpb_before": 1.5, "bpb_after": 1.6, "gap": 0.1, "byte_count": "text"}
    ngram = {"cache": "hashed5", "loss": 2.0, "bpb": 1.25, "mass": {"mean": 1.2}}
    score = {"loss": 3.0, "bpb": 1.5, "mode": "sliding", "stride": 64, "tokens": 2048}
    score |= {"weights": "ema", "step": 40, "ngram": ngram | {"is_distribution": False}}
    score["data"] = {"name": "text", "hash": "0123456789ab"}
    score["tasks"] = {"lambada": {"acc": 0.5}, "odd": 3}
    (directory / "export.json").write_text(json.dumps(export))
    (directory / "evaluate.json").write_text(json.dumps(score))
    data = report([read_run(directory)], "now")
    (exported,) = data["exports"]
    said = ["run · export.json", "1,234 bytes", "does not fit the limit of 1,200"]
    for part in (*said, "BPB (text bytes) 1.50000", "1.60000 after", "gap +0.10000"):
        assert part in exported["title"]
    row = dict(zip(exported["columns"], cells(exported["rows"][0]), strict=True))
    found = [row[name] for name in ("group", "kept as", "bytes", "entropy, bits")]
    assert found == ["mlp", "int8", "990", "–"]
    found = [cells(row) for row in data["evaluations"]["rows"]]
    data = "text (0123456789ab)"
    assert found[0][3:] == ["ema", "sliding, stride 64", "2,048", data, "3.0000", "1.5000", ""]
    note = "mass 1.2: not a distribution"
    what = "sliding, stride 64, hashed5 cache"
    assert found[1][4:] == [what, "2,048", data, "2.0000", "1.2500", note]
    assert found[2][4] == "lambada" and found[2][-1] == "acc 0.5"
    assert len(found) == 3


def test_results_of_any_shape_are_no_bug(tmp_path):
    directory = fake_run.make(tmp_path / "run")
    for name, content in {
        "a": '{"artifact_bytes": "x", "bits_per_weight": [1], "score": 3, "limit": null}',
        "b": '{"artifact_bytes": null, "bits_per_weight": {"mlp": 3}, "total_bytes": "y"}',
        "c": '{"bpb": null, "mode": {}, "ngram": 3, "tasks": [1]}',
        "summary": '{"val_bpb": "x", "train_seconds": [], "val_loss": 1e308}',
    }.items():
        (directory / f"{name}.json").write_text(content)
    data = report([read_run(directory)], "now")
    assert [len(table["rows"]) for table in data["exports"]] == [0, 1]
    json.dumps(data, allow_nan=False)


def test_long_runs_make_a_bounded_page(tmp_path):
    run, rng = made(tmp_path / "run", steps=10, levels=3), np.random.default_rng(0)
    steps = np.arange(20_000.0)
    long = {name: Series(steps, rng.normal(size=20_000)) for name in run.series}
    long["code/layer00/cos"].values[777] = 100.0
    data = report([replace(run, series=long)] * 3, "now")
    curves = data["runs"][0]["curves"]
    assert all(len(numbers) <= 600 for numbers in data["numbers"])
    for kind in ("raw", "mean"):
        assert len(data["numbers"][curves["train_loss"][kind][0]]) >= 200
    values = data["numbers"][curves["code/layer00/cos"]["raw"][1]]
    assert len(values) <= 60 and 100 in values
    assert len(page(data)) < 2_000_000


def test_health_is_known_by_level_and_layer(tmp_path):
    found = report([made(tmp_path / "run", levels=2)], "now")["health"]
    levels = {entry["name"]: entry["levels"] for entry in found["quantities"]}
    assert levels == {"dead": [0, 1], "cos": [], "mu_mean": [0, 1]}
    assert found["layers"] == ["00", "01"]


def test_numbers_are_kept_to_six_digits(tmp_path):
    data = report([made(tmp_path / "run")], "now")
    steps, values = (data["numbers"][i] for i in data["runs"][0]["curves"]["train_loss"]["raw"])
    assert steps == list(range(1, 41))
    assert values == pytest.approx([fake_run.loss(step, 1) for step in steps], rel=5e-6)
    assert data["health"] is None


def test_names_and_settings_are_data(tmp_path):
    directory = fake_run.make(tmp_path / "evil")
    config = json.loads((directory / "config.json").read_text())
    config["eval"]["sample_prompt"] = HOSTILE
    (directory / "config.json").write_text(json.dumps(config))
    moved = directory.rename(tmp_path / "<img src=x onerror=alert(1)>")
    html = page(report([read_run(moved), made(tmp_path / "tame")], "now"))
    assert "<img" not in html and html.count("</script>") == 2
    assert html.count("\\u003cimg src=x onerror") >= 3
