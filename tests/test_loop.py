"""Decisions of the loop that no whole run shows: what is not saved, and which validation is the best."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sngpt_jax import loop
from sngpt_jax.evaluation.bpb import Score
from sngpt_jax.loop import NonFinite, Position, Run, Stopped
from sngpt_jax.parallel import make_mesh
from sngpt_jax.recipe import load
from sngpt_jax.step import TrainState


class Recorder:
    """Stands for the writer, the console and the checkpoints: keeps what it is told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.fixture
def run(tiny_recipe):
    return Run(
        config=load(str(tiny_recipe)),
        console=Recorder(),
        mesh=make_mesh(jax.devices()[:1]),
        data=SimpleNamespace(val=range(5000), tokenizer=SimpleNamespace(token_bytes=lambda: None)),
        state=TrainState(step=jnp.int32(0), params={"w": jnp.ones(3)}, opt_state={}, key=jax.random.key(0)),
        done=0,
        position=Position(),
        train_step=None,
        loader=SimpleNamespace(get_state=lambda: {"next_index": 0}),
        writer=Recorder(),
        checkpoints=Recorder(),
        meter=Recorder(),
        profiler=None,
        signals=SimpleNamespace(received=None),
    )


def validate(run, monkeypatch, *values):
    """Validates after steps 0, 1, 2 … with these losses."""
    for step, loss in enumerate(values):
        monkeypatch.setattr(loop, "score_stream", lambda *a, loss=loss, **k: Score(loss, loss / 2, 10, 20))
        run.done = step
        run.validate()


def test_the_best_validation_is_the_lowest_and_the_first_the_untrained_models(run, monkeypatch):
    validate(run, monkeypatch, 5.0, 3.0, 4.0)
    assert run.position.best_val_loss == 3.0
    assert run.position.first.loss == 5.0
    assert (run.position.latest.step, run.position.latest.loss) == (2, 4.0)


def test_a_checkpoint_is_given_the_score_of_its_own_step_alone(run, monkeypatch):
    validate(run, monkeypatch, 5.0, 3.0)
    run.save()
    run.done = 2
    run.save()
    assert [kwargs["value"] for _, _, kwargs in run.checkpoints.calls] == [3.0, None]
    position = run.checkpoints.calls[1][1][2]
    assert Position.from_json(position) == run.position


def test_parameters_that_are_not_finite_are_not_saved(run):
    run.state = TrainState(step=jnp.int32(1), params={"w": jnp.asarray([1.0, jnp.nan])}, opt_state={}, key=jax.random.key(0))
    with pytest.raises(NonFinite, match="parameter is not finite after step 0"):
        run.save()
    assert not run.checkpoints.calls


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_that_is_not_finite_stops(run, monkeypatch, loss):
    with pytest.raises(NonFinite, match="validation loss after step 0"):
        validate(run, monkeypatch, loss)


def test_a_signal_ends_a_validation_that_is_under_way(run, monkeypatch):
    def score(*args, progress, **kwargs):
        progress(1, 10)
        run.signals.received = "SIGTERM"
        progress(2, 10)

    monkeypatch.setattr(loop, "score_stream", score)
    with pytest.raises(Stopped):
        run.validate()
    assert run.position.latest is None


def test_a_signal_in_the_measurement_of_health_keeps_the_validation(run, monkeypatch):
    def health(*args, progress, **kwargs):
        run.signals.received = "SIGTERM"
        progress(1, 10)

    monkeypatch.setattr(loop, "score_health", health)
    run.health_step = lambda *args: None
    run.state = TrainState(step=jnp.int32(0), params={}, opt_state={}, key=jax.random.key(0))
    with pytest.raises(Stopped):
        validate(run, monkeypatch, 5.0)
    assert (run.position.latest.loss, run.position.best_val_loss) == (5.0, 5.0)
