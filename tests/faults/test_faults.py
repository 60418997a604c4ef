"""The short form of `python -m tests.faults`: what other tests of runs do not do already."""

import random

import pytest

from tests.faults import damage, disks, kills, numbers
from tests.faults.__main__ import BEGIN, END, HEAD, SCENARIOS, line, write_between
from tests.faults.lab import Lab, Row, described

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"), kills=1, rng=random.Random(0), thorough=False)


EVERY_DAY = (kills.of_trainings, disks.full_in_training, damage.other_data)
AT_TIMES = (kills.of_preparations, disks.full_for_output, numbers.nan_is_skipped, numbers.clock)


@pytest.mark.parametrize(
    "scenario",
    [*EVERY_DAY, *(pytest.param(scenario, marks=pytest.mark.full) for scenario in AT_TIMES)],
    ids=lambda scenario: scenario.__name__,
)
def test_nothing_is_lost(scenario, lab):
    assert scenario in SCENARIOS
    row = described(scenario(lab), lab)
    assert row.tried and str(lab.folder) not in row.message


def test_the_table_takes_the_place_of_the_one_before(tmp_path):
    page, new = tmp_path / "page.md", line(Row("fault", "what", "message", "2", 3))
    page.write_text(f"above\n{BEGIN}old\n{END}below\n")
    with pytest.raises(SystemExit, match="run all scenarios"):
        write_between(page, {0: new}, 2)
    write_between(page, {0: "first", 1: "second"}, 2)
    write_between(page, {1: new}, 2)
    assert new == "| fault | what | `message` | 2 | 3 | nothing |"
    assert page.read_text() == "\n".join(
        ["above", BEGIN.strip(), *HEAD, "first", new, END.strip(), "below", ""]
    )
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        write_between(page, {}, 0)
