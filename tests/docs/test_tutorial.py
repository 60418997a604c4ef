"""docs/tutorial.md as a reader follows it: its commands in order, in an empty folder, and what its
text says of the results.

The training is shortened to 20 steps; all else is run as it stands.
"""

import json
import math
import re

import pytest

from tests.docs.followed import ROOT, follow

pytestmark = pytest.mark.slow

CAP = 16_000_000


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder in which the page's blocks were followed, and what each command block printed on
    stdout.
    """
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, follow(ROOT / "docs/tutorial.md", folder, ROOT, training="--train.steps 20")


def test_the_artifact_is_below_the_cap_and_scores(followed):
    folder, _ = followed
    exported, scored = (
        json.loads((folder / f"runs/pocket/{name}.json").read_text())
        for name in ("export", "artifact")
    )
    size = (folder / "pocket.sngpt").stat().st_size
    assert exported["artifact_bytes"] == size
    assert (
        exported["total_bytes"]
        == size + (folder / "pocket.pyz").stat().st_size
        <= exported["limit"]
        == CAP
    )
    assert exported["fits"] is True
    assert math.isfinite(scored["bpb"]) and scored["bpb"] > 0
    # both over all of the held-out text
    assert scored["bpb"] == pytest.approx(exported["score"]["bpb_after"], rel=1e-5)


def test_what_the_page_says_of_the_model_and_the_run(followed):
    folder, printed = followed
    page = (ROOT / "docs/tutorial.md").read_text()
    planned, summary = (
        "".join(printed),
        json.loads((folder / "runs/pocket/summary.json").read_text()),
    )
    for parameters in re.findall(r"([\d,]{7,}) parameters", page):
        assert f"parameters   {parameters} " in planned
    assert summary["val_bpb"] < summary["untrained_val_bpb"]
    manifest = json.loads((folder / "data/pocket/manifest.json").read_text())
    assert sum(shard["documents"] for shard in manifest["val"]) == 8
    assert len(list((folder / "texts").iterdir())) == sum(
        shard["documents"] for s in ("train", "val") for shard in manifest[s]
    )


def test_sliding_windows_score_at_least_as_well_as_standard_ones(followed):
    folder, _ = followed
    sliding, whole = (
        json.loads((folder / f"runs/pocket/{name}.json").read_text())
        for name in ("sliding", "summary")
    )
    assert 0 < sliding["bpb"] < whole["val_bpb"]


def test_the_report_has_the_run_and_its_results(followed):
    folder, _ = followed
    page = (folder / "pocket.html").read_text()
    sliding, exported = (
        json.loads((folder / f"runs/pocket/{name}.json").read_text())
        for name in ("sliding", "export")
    )
    for shown in ("Report of pocket", f"{sliding['bpb']:.4f}", f"{exported['artifact_bytes']:,}"):
        assert shown in page
