"""Decisions of a run that no whole run shows."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import changed
from sngpt_jax.config.recipe import load
from sngpt_jax.evaluation.bpb import Score
from sngpt_jax.model.gpt import GPT
from sngpt_jax.run.clock import Stopwatch
from sngpt_jax.run.console import Console
from sngpt_jax.run.meter import StepMeter
from sngpt_jax.training import compiler, loop, state, trainer
from sngpt_jax.training.loop import NonFinite, Position, Run, Stopped, Validation
from sngpt_jax.training.state import TrainState
from tests.screen import Clock
from tests.training.steps import controls


class Recorder:
    """Stands for the writer, the console and the checkpoints: keeps what it is told."""

    def __init__(self):
        self.calls = []

    def progress(self, label):
        return lambda done, total: None

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def state_of(w):
    return TrainState(jnp.int32(0), {"w": w}, opt_state={}, key=jax.random.key(0))


@pytest.fixture
def run(tiny_recipe):
    return Run(
        config=load(str(tiny_recipe)),
        console=Recorder(),
        mesh=make_mesh(jax.devices()[:1]),
        data=SimpleNamespace(val=range(5000), tokenizer=SimpleNamespace(token_bytes=lambda: None)),
        state=state_of(jnp.ones(3)),
        done=0,
        position=Position(),
        train_step=None,
        eval_step=None,
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
        score = Score(loss, loss / 2, 10, 20, "text", 20, 20, 0.0, 0)
        monkeypatch.setattr(loop.Pass, "score", lambda _, score=score: score)
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
    assert Position.from_json(position, "here") == run.position


def test_parameters_that_are_not_finite_are_not_saved(run):
    run.state = state_of(jnp.asarray([1.0, jnp.nan]))
    with pytest.raises(NonFinite, match="parameter is not finite after step 0"):
        run.save()
    assert not run.checkpoints.calls


@pytest.fixture
def skipping(run):
    rule = {"nonfinite": "skip", "max_skipped_steps": 2, "log_every": 100}
    run.config, run.meter = changed(run.config, train=rule), StepMeter(1, 1.0, None)
    run.meter.start(0)
    return run


def read(run, step, loss, skipped, in_a_row):
    metrics = {"loss": loss, "grad_norm": 1.0, "skipped": skipped, "skipped_in_a_row": in_a_row}
    run.sent = (step, controls(), metrics)
    run.read()


def test_a_skipped_step_is_logged_and_said_once(skipping):
    run, steps = skipping, ((1, 3.0, 0, 0), (2, math.nan, 1, 1), (3, 9.0, 2, 2), (4, 3.0, 2, 0))
    for step in steps:
        read(run, *step)
    logged = [args[0] for name, args, _ in run.writer.calls if name == "write"]
    assert [(record["step"], record["skipped"]) for record in logged] == [(2, 1), (3, 2)]
    said = [args[0] for name, args, _ in run.console.calls if name == "print"]
    assert said == [
        "step 2: skipped, loss nan, gradient norm 1; 1 so far",
        "step 3: skipped, loss 9.0000, gradient norm 1; 2 so far",
    ]


def test_too_many_skipped_steps_in_a_row_end_the_run(skipping):
    for step, skipped, in_a_row in ((5, 1, 1), (6, 1, 0), (7, 2, 1), (8, 3, 2)):
        read(skipping, step, math.nan if in_a_row else 3.0, skipped, in_a_row)
    said = "step 9, loss nan, .* number 3 in a row; train.max_skipped_steps = 2"
    with pytest.raises(NonFinite, match=said) as error:
        read(skipping, 9, math.nan, 4, 3)
    # step 6 was the last that counted, and its loss that of the parameters after step 5
    assert error.value.good == 5


@pytest.mark.parametrize("inline", [True, False])
def test_a_step_is_given_its_own_time_whenever_it_is_read(run, monkeypatch, inline):
    """Step n takes n seconds, before the call returns as on a CPU or after it."""
    clock, ends = Clock(), {}

    class Loss:
        """What step `number` gives: ready when it has ended, and waited for by who reads it."""

        def __init__(self, number):
            self.number = number

        def is_ready(self):
            return clock.now >= ends[self.number]

        def __float__(self):
            clock.now = max(clock.now, ends[self.number])
            return 3.0

    def train_step(state, batch, controls):
        number = len(ends) + 1
        ends[number] = max(clock.now, ends.get(number - 1, 0.0)) + number
        if inline:
            clock.now = ends[number]
        return state, {"loss": Loss(number), "grad_norm": 1.0}

    run.meter, run.stopwatch = StepMeter(1, 1.0, None, clock), Stopwatch(0.0, clock)
    run.train_step, run.loader = train_step, itertools.repeat({})
    run.profiler = SimpleNamespace(begins_with=lambda step: False, ends_with=lambda step: False)
    monkeypatch.setattr(run, "validate", lambda: setattr(clock, "now", clock.now + 1000))
    monkeypatch.setattr(run, "save", lambda: setattr(clock, "now", clock.now + 1000))
    run.loop()
    logged = [args[0] for name, args, _ in run.writer.calls if name == "write"]
    found = [(record["step"], record["step_ms"]) for record in logged]
    assert found == [(n, 1000 * n) for n in range(1, 21)]


@pytest.mark.parametrize(
    ("done", "known", "asked"),
    [(0, None, [(True, False)]), (10, 5, [(True, True)]), (10, 10, []), (7, 0, [])],
)
def test_a_validation_that_a_signal_ended_is_made_up_for(run, monkeypatch, done, known, asked):
    run.done, seen = done, []
    run.position = Position(latest=None if known is None else Validation(known, 3.0, 2.0, 10))
    monkeypatch.setattr(run, "aside", lambda validating, saving: seen.append((validating, saving)))
    monkeypatch.setattr(run, "agree_on_time", lambda: math.inf)
    run.config = changed(run.config, train={"max_seconds": 1.0})
    run.loop()
    assert seen == asked


def test_the_first_validation_of_imported_weights_is_not_the_untrained_models(run, monkeypatch):
    run.position = Position(imported=True)
    validate(run, monkeypatch, 5.0, 3.0)
    assert run.position.first is None
    assert run.position.best_val_loss == 3.0
    assert Position.from_json(dataclasses.asdict(run.position), "here") == run.position


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_that_is_not_finite_stops(run, monkeypatch, loss):
    with pytest.raises(NonFinite, match="validation loss after step 0"):
        validate(run, monkeypatch, loss)


def test_a_signal_ends_a_validation_that_is_under_way(run, monkeypatch):
    def score(scoring):
        scoring.progress(1, 10)
        run.signals.received = "SIGTERM"
        scoring.progress(2, 10)

    monkeypatch.setattr(loop.Pass, "score", score)
    with pytest.raises(Stopped):
        run.validate()
    assert run.position.latest is None


def test_a_signal_in_the_measurement_of_health_keeps_the_validation(run, monkeypatch):
    def health(*args, progress, **kwargs):
        run.signals.received = "SIGTERM"
        progress(1, 10)

    monkeypatch.setattr(loop, "score_health", health)
    run.health_step = lambda *args: None
    with pytest.raises(Stopped):
        validate(run, monkeypatch, 5.0)
    assert (run.position.latest.loss, run.position.best_val_loss) == (5.0, 5.0)


def test_a_run_builds_its_model_and_optimizer_twice_at_most(tiny_recipe, tmp_path, monkeypatch):
    """Up to its first step: once for the shapes, and the model once more for its initial values."""
    built = []

    def counting(name, build):
        return lambda *args, **kwargs: (built.append(name), build(*args, **kwargs))[1]

    def first_step(run, seconds):
        raise StopIteration

    # a vocabulary that no other test has, since the model's graph is kept for a process
    config = changed(load(str(tiny_recipe)), model={"vocab_size": 323}, optim={"qat_below": 0.5})
    monkeypatch.setattr(GPT, "__init__", counting("model", GPT.__init__))
    monkeypatch.setattr(state, "make_optimizer", counting("optimizer", state.make_optimizer))
    monkeypatch.setattr(loop.Run, "step", first_step)
    for change_of_the_process in ("keep_working_memory", "use_compilation_cache"):
        monkeypatch.setattr(compiler, change_of_the_process, lambda *args: None)
    monkeypatch.setattr(trainer, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:1], fsdp))
    console = Console(config.train.steps, config.train.max_seconds, quiet=True)
    with pytest.raises(StopIteration), console:
        trainer.train(config, tmp_path, console)
    assert built.count("model") == 2
    assert built.count("optimizer") == 1
