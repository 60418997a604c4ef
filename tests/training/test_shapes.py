"""What follows from a recipe's shapes is computed once for a run."""

import jax
import pytest

from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import changed
from sngpt_jax.config.recipe import load
from sngpt_jax.model.gpt import GPT
from sngpt_jax.run.console import Console
from sngpt_jax.training import loop, state, trainer


class Reached(Exception):
    pass


def test_a_run_builds_its_model_and_optimizer_twice_at_most(tiny_recipe, tmp_path, monkeypatch):
    """Up to its first step: once for the shapes, and the model once more for its initial values."""
    built = []

    def counting(name, build):
        return lambda *args, **kwargs: (built.append(name), build(*args, **kwargs))[1]

    def first_step(run, seconds):
        raise Reached

    # a vocabulary that no other test has, since the model's graph is kept for a process
    config = changed(load(str(tiny_recipe)), model={"vocab_size": 323}, optim={"qat_below": 0.5})
    monkeypatch.setattr(GPT, "__init__", counting("model", GPT.__init__))
    monkeypatch.setattr(state, "make_optimizer", counting("optimizer", state.make_optimizer))
    monkeypatch.setattr(loop.Run, "step", first_step)
    for change_of_the_process in ("keep_working_memory", "use_compilation_cache"):
        monkeypatch.setattr(trainer, change_of_the_process, lambda *args: None)
    monkeypatch.setattr(trainer, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:1], fsdp))
    console = Console(config.train.steps, config.train.max_seconds, quiet=True)
    with pytest.raises(Reached), console:
        trainer.train(config, tmp_path, console)
    assert built.count("model") == 2
    assert built.count("optimizer") == 1
