"""NaN in a gradient, and a wall clock that jumps."""

from sngpt_jax.run.metrics import read_metrics
from tests import tiny_run
from tests.faults.lab import Lab, Row


def nan_stops(lab: Lab) -> Row:
    run = lab.fresh("nan")
    done = lab.run(lab.injected(("--nan", 7), lab.training(run)))
    assert done.status == 3, done
    assert "the loss of step 8 is nan" in done.error and "checkpoints/00000006" in done.error, done
    return Row(
        "NaN in a gradient",
        "The training stops and names the last good checkpoint.",
        done.error,
        "3",
    )


def nan_is_skipped(lab: Lab) -> Row:
    """Two steps change nothing, and a run that is killed after them ends as one that is not."""
    skip, nan = ("--train.nonfinite", "skip"), ("--nan", "7,15")
    whole, killed = lab.fresh("skipped"), lab.fresh("skipped_killed")
    done = lab.run(lab.injected(nan, lab.training(whole, *skip)))
    assert done.status == 0 and "Traceback" not in done.err, done
    said = [line for line in done.out.splitlines() if "skipped," in line]
    assert len(said) == 2, said
    counts = {step: count for step, _, count in tiny_run.losses(whole, ("skipped",))}
    assert [counts[step] for step in (6, 7, 14, 15, 40)] == [0, 1, 1, 2, 2]
    command = lab.injected(nan, lab.training(killed, *skip))
    saved = killed / "checkpoints" / "00000010.json"
    assert lab.kill_at(lab.start(command), saved.exists)
    assert lab.run(command).status == 0
    tiny_run.assert_same_run(whole, killed)
    assert tiny_run.losses(killed, ("skipped",)) == tiny_run.losses(whole, ("skipped",))
    return Row(
        "NaN in two gradients, with `train.nonfinite = skip`",
        "The steps change nothing and are counted. The count survives a kill.",
        said[0],
        "0",
        2,
        "two updates",
    )


def nan_to_the_limit(lab: Lab) -> Row:
    """One skipped step more in a row than are allowed."""
    limit = ("--train.nonfinite", "skip", "--train.max-skipped-steps", 2)
    training = lab.training(lab.fresh("limit"), *limit, "--train.keep-checkpoints", 4)
    done = lab.run(lab.injected(("--nan", "9,10,11"), training))
    assert done.status == 3, done
    assert "step 11" in done.error and "number 3 in a row" in done.error, done
    # step 8's parameters are those that the steps after it failed with
    assert "checkpoints/00000006" in done.error, done
    return Row(
        "NaN in more gradients in a row than `train.max_skipped_steps`, with"
        " `train.nonfinite = skip`",
        "The training stops and names the last good checkpoint.",
        done.error,
        "3",
    )


def clock(lab: Lab) -> Row:
    """Schedules and measurements take another clock than the one that people set."""
    runs = [lab.fresh(f"clock{i}") for i in range(2 if lab.thorough else 1)]
    for seed, run in enumerate(runs):
        done = lab.run(lab.injected(("--clock", seed), lab.training(run)))
        assert done.status == 0 and "Traceback" not in done.err, done
        tiny_run.assert_same_run(lab.reference, run)
        records = read_metrics(run / "metrics.jsonl")
        elapsed = [record["elapsed_seconds"] for record in records if "elapsed_seconds" in record]
        assert elapsed == sorted(elapsed) and elapsed[-1] < 600
        assert all(0 < record["step_ms"] < 600_000 for record in records if "step_ms" in record)
    return Row(
        "the system clock jumps by up to a day, back and forth",
        "The training is unaffected, because it measures time with a clock that cannot be set.",
        tried=len(runs),
        status="0",
    )
