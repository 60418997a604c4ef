"""First light on a CPU: which parts run, and that nothing ends the parts behind it."""

import json
import sys

import pytest
from sngpt_kernels.dispatch import CannotServe

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import __main__ as command
from sngpt_jax.bench import first_light, first_light_parts, first_light_steps
from sngpt_jax.bench.first_light import FAILED, LATE, PROVEN, SKIPPED, Part
from sngpt_jax.config.recipe import load
from sngpt_jax.training.trust import OPERATIONS
from tests.tiny_run import COMPILE_QUICKLY

# Part 1 with a kernel whose values are a hundredth too large.
WRONG = """
import dataclasses, sys
from sngpt_jax.bench import first_light_parts as parts
interpreted = parts.interpreted
def wrong(case):
    right = interpreted(case)
    def run(*arguments, implementation):
        scale = 1.01 if implementation == "pallas_triton" else 1
        return scale * right.run(*arguments, implementation=implementation)
    return dataclasses.replace(right, run=run)
parts.interpreted = wrong
sys.exit(parts.main(["parity", "--device", "cpu", *sys.argv[1:]]))
"""
KEPT = "open(sys.argv[2], 'w').write('{}')"  # a result, as a part keeps it


def part(name, code, seconds=60):
    return Part(name, seconds, name, (sys.executable, "-c", f"import sys, time; {code}"))


def states(result):
    return {row["part"]: row["state"] for row in result["rows"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", COMPILE_QUICKLY)

    def run(*chosen, minutes=8):
        lines = []
        options = {"minutes": minutes, "device": "cpu", "say": lines.append}
        return first_light.run(chosen, out=tmp_path, **options), lines

    return run


def test_what_fails_or_runs_out_of_time_does_not_end_the_rest(run, tmp_path):
    result, lines = run(
        part("fails", "sys.exit('out of luck')"),
        part("late", f"{KEPT}; time.sleep(60)", seconds=1),
        part("right", KEPT),
    )
    assert states(result) == {"fails": FAILED, "late": LATE, "right": PROVEN}
    assert result["rows"][0][FAILED] == "out of luck"
    assert lines[-4:-1] == ["proven: right", "failed: fails", "out of time: late"]
    assert json.loads((tmp_path / "first_light.json").read_text()) == result
    assert "| late | out of time: it had 1 s |" in (tmp_path / "first_light.md").read_text()


def test_results_are_written_after_every_part(run, tmp_path):
    look = f"rows = len(open({str(tmp_path / 'first_light.md')!r}).readlines())"
    keep = "import json; json.dump({'rows': rows}, open(sys.argv[2], 'w'))"
    result, _ = run(part("first", KEPT), part("second", f"{look}; {keep}"))
    assert result["rows"][1]["result"] == {"rows": 5}


def test_parts_without_time_are_skipped_by_name(run):
    result, lines = run(part("long", "time.sleep(60)", 480), part("other", KEPT), minutes=0.02)
    assert states(result) == {"long": LATE, "other": SKIPPED}
    assert "skipped: other" in lines


def test_the_parts_of_a_gpu_fit_into_their_time():
    parts = first_light.parts("gpu")
    assert [part.name for part in parts[:3]] == [
        "parity",
        "step golf_12l_recycled",
        "step cayley_small_3l",
    ]
    assert sum(part.seconds for part in parts[:7]) <= 60 * first_light.MINUTES
    for name in first_light_parts.RECIPES["gpu"]:
        config = first_light_parts.one_microbatch(name, "gpu")
        assert config.data.batch_tokens == load(name).train.device_batch_tokens


@pytest.mark.slow
def test_from_end_to_end(tmp_path, monkeypatch, capsys):
    """All parts of a CPU, behind part 1 with a wrong kernel."""
    monkeypatch.setenv("XLA_FLAGS", COMPILE_QUICKLY)
    wrong = Part("wrong", 60, "", (sys.executable, "-c", WRONG))
    real = first_light.parts
    monkeypatch.setattr(first_light, "parts", lambda *given: (wrong, *real(*given)))
    monkeypatch.setattr(first_light_parts, "COMPARED", {"cpu": "quickstart_cayley"})
    out = str(tmp_path / "out")
    assert command.main(["first-light", "--device", "cpu", "--minutes", "16", "--out", out]) == 1
    written = json.loads((tmp_path / "out/first_light.json").read_text())
    rows = {row["part"]: row for row in written["rows"]}
    found = {name: row["state"] for name, row in rows.items()}
    torch = found.pop("torch")
    assert found == {
        "wrong": FAILED,
        "parity": PROVEN,
        "step quickstart": PROVEN,
        "step quickstart_cayley": PROVEN,
        "kernels": PROVEN,
        "tune": SKIPPED,
        "train": PROVEN,
    }, capsys.readouterr().out
    assert "xsa quickstart pallas_triton: its value differs from xla's" in rows["wrong"][FAILED]
    assert torch != PROVEN  # it has no sparse codes, or is not installed
    assert rows["train"]["result"]["kernel_seconds"]
    for path in rows["step quickstart"]["result"]["paths"].values():
        assert len(path["losses"]) == 20 and path["tok_per_s"] > 0
    assert "| quickstart_cayley | kernels |" in (tmp_path / "out/first_light.md").read_text()


def test_refusals(tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(UserError, match="it is not empty"):
        command.main(["first-light", "--pack", str(tmp_path)])
    with pytest.raises(UserError, match="--minutes 0: expected more than 0"):
        command.main(["first-light", "--minutes", "0", "--out", str(tmp_path)])


def test_plain_xla_names_it_for_every_operation():
    plain = first_light_steps.in_plain_xla(load("golf_9l_xsa_ngram")).model
    assert {operation.named(plain) for operation in OPERATIONS.values()} == {"xla"}


def test_steps_that_cannot_run_prove_nothing(monkeypatch, tmp_path):
    def cannot_serve(config, trace):
        raise CannotServe("no such device")

    monkeypatch.setattr(first_light_steps, "run_steps", cannot_serve)
    config = first_light_steps.one_microbatch("quickstart", "cpu")
    found = first_light_steps.compare_steps("quickstart", config, tmp_path / "step", print)
    assert found["problem"] == "kernels: no such device; plain xla: no such device"
