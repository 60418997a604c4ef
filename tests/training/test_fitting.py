"""A step that does not fit the device's memory, and the microbatch that does."""

import re

import jax
import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import step as bench
from sngpt_jax.cluster import memory
from sngpt_jax.cluster.layout import ProcessArguments
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, changed
from sngpt_jax.config import file as config_file
from sngpt_jax.config.recipe import load
from sngpt_jax.run import checkpoint
from sngpt_jax.training import compiler, fitting, trainer
from sngpt_jax.training.fitting import Need
from sngpt_jax.training.state import Shapes
from sngpt_jax.training.step import make_train_step

T = 32
CONFIG = Config(
    model=ModelConfig(
        vocab_size=64, num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, mlp_dim=64
    ),
    optim=OptimConfig(schedule="constant", newton_schulz_dtype="float32"),
    data=DataConfig(batch_tokens=8 * 8 * T, seq_len=T),
    train=TrainConfig(steps=2, device_batch_tokens=8 * 8 * T),
)


def mesh():
    return make_mesh(jax.devices()[:1])


@pytest.fixture
def device(monkeypatch):
    """A function that gives every device so many bytes, and a sixteenth that stays free."""
    return lambda size: monkeypatch.setattr(
        memory, "device_memory", lambda device: 1 + size * 16 // 15
    )


@pytest.fixture(scope="module")
def needs():
    """The bytes of the step by the tokens of a microbatch."""

    def total(tokens):
        config = changed(CONFIG, train={"device_batch_tokens": tokens})
        return fitting.need_of(Shapes.of(config, mesh())).total

    return {tokens: total(tokens) for tokens in (64 * T, 16 * T, T)}


def test_the_benchmark_refuses_before_its_first_step_and_names_what_fits(device, needs):
    device(needs[16 * T])
    with pytest.raises(UserError, match="the step needs .* and the device has") as caught:
        bench.OurStep(CONFIG, mesh())
    tokens = int(re.search(r"--train.device-batch-tokens (\d+) needs", str(caught.value))[1])
    assert tokens == 16 * T
    own = changed(CONFIG, train={"device_batch_tokens": tokens})
    bench.OurStep(own, mesh()).loader.close()


def test_automatic_microbatches_are_the_largest_that_fit(device, needs):
    automatic = Shapes.of(changed(CONFIG, train={"device_batch_tokens": 0}), mesh())
    for tokens in (64 * T, 16 * T, T):
        device(needs[tokens])
        assert fitting.resolved(automatic, "check").config.train.device_batch_tokens == tokens
    device(needs[T] - 2)
    with pytest.raises(UserError, match="not even one sequence per microbatch fits"):
        fitting.resolved(automatic, "check")


def test_temporaries_shrink_with_the_microbatch():
    need = Need(fixed=10, temporaries=90)
    for limit, sequences in ((55, 46), (99, 79), (9, 0)):  # 80 x 45 / 90 and an eighth, and one
        assert fitting.fewer(need, limit, sequences=80) == sequences
    assert fitting.fewer(need, 50, sequences=1) == 0


def test_the_figures_are_those_of_the_compiled_program():
    """Fixed: state and batch, of which the state is written over. A limited run copies it once."""
    shapes = Shapes.of(CONFIG, mesh())
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes.state.params))
    batch = 2 * 2 * CONFIG.data.batch_tokens
    once = fitting.need_of(shapes)
    limited = fitting.need_of(Shapes.of(changed(CONFIG, train={"max_seconds": 1.0}), mesh()))
    assert 2 * size < once.fixed - batch < 4 * size  # parameters with one or two moments
    assert limited.fixed == pytest.approx(2 * once.fixed, rel=0.01)


@pytest.fixture
def train(tiny_recipe, tmp_path, monkeypatch):
    """Trains the tiny recipe with microbatches of so many tokens, in tmp_path / "run"."""
    for name in ("keep_working_memory", "use_compilation_cache"):  # they change the process
        monkeypatch.setattr(compiler, name, lambda *args: None)
    monkeypatch.setattr(trainer, "make_mesh", lambda fsdp: mesh())

    def train(tokens, **fields):
        config = changed(
            load(str(tiny_recipe)),
            optim={"swa_every": 0, "warmdown_fraction": 0.0, "schedule": "constant"},
            train={"device_batch_tokens": tokens, "steps": 2, **fields},
            eval={"every": 0},
        )
        members = ProcessArguments()
        return trainer.run(config, tmp_path / "run", members, quiet=True, again="again")

    return train


@pytest.mark.slow
def test_validation_that_does_not_fit_is_refused_before_the_run_begins(
    train, device, tmp_path, monkeypatch
):
    """Rows of validation of which all are scored at once, beside a small microbatch."""
    shapes, make = [], make_train_step
    monkeypatch.setattr(trainer, "make_train_step", lambda s: shapes.append(s) or make(s))
    device(10)
    with pytest.raises(UserError, match="the step needs"):
        train(64)
    device(fitting.need_of(shapes[0]).total)
    with pytest.raises(UserError, match="validation needs .*batch-tokens 256 needs") as caught:
        train(64)
    assert not (tmp_path / "run" / "config.json").exists(), caught


@pytest.mark.slow
def test_a_run_that_does_not_fit_leaves_nothing_and_an_automatic_one_resumes(
    train, device, tmp_path, monkeypatch
):
    shapes, used = [], []
    resolved, make = fitting.resolved, make_train_step
    monkeypatch.setattr(fitting, "resolved", lambda *a: shapes.append(resolved(*a)) or shapes[-1])
    monkeypatch.setattr(
        trainer, "make_train_step", lambda s: used.append(fitting.accumulation_of(s)) or make(s)
    )
    device(10)
    with pytest.raises(UserError, match="not even one sequence"):
        train(2048)
    assert not (tmp_path / "run" / "config.json").exists() and used.pop() == 1

    config = changed(shapes[0].config, train={"device_batch_tokens": 512})
    device(fitting.need_of(Shapes.of(config, mesh())).total)
    assert train(0) == 0 and used.pop() == 4
    kept = config_file.read(tmp_path / "run" / "config.json")
    assert kept.train.device_batch_tokens == 512

    # the run keeps its microbatches, though the device now has more memory
    (tmp_path / "run" / "summary.json").unlink()
    device(2**40)
    assert train(0) == 0 and used.pop() == 4
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
