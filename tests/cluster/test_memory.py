"""Work that does not fit the device's memory."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sngpt_jax.base.errors import UserError, one_line
from sngpt_jax.cluster import memory
from sngpt_jax.cluster.memory import Fitted
from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.config import Config, DataConfig, EvalConfig, ModelConfig, parse_levels
from sngpt_jax.evaluation.calibration import second_moments
from sngpt_jax.evaluation.likelihood import LanguageModel
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.evaluation.windows import standard_windows
from sngpt_jax.features.study import Slice
from sngpt_jax.model.forward import init_variables, join
from sngpt_jax.model.generation import generate
from tests.evaluation.test_calibration import random_tokens, stream_of
from tests.evaluation.test_likelihood import Letters

T = 16
SMALL = {"vocab_size": 40, "num_layers": 1, "d_model": 16, "num_heads": 2, "max_seq_len": T}
MODEL = ModelConfig(**SMALL, num_kv_heads=1, mlp_dim=32)
CODED = ModelConfig(
    **SMALL,
    family="pre_norm",
    positions="learned",
    num_kv_heads=2,
    mlp_dim=64,
    mlp_activation="gelu",
    levels=parse_levels("4,3,0"),
)


def variables_of(model):
    return join(*init_variables(model, jax.random.key(0)))


@pytest.fixture
def device(monkeypatch):
    """A function that gives every device so many bytes."""
    return lambda size: monkeypatch.setattr(memory, "device_memory", lambda device: size)


def test_scoring_names_the_batch_that_fits_before_it_begins(device):
    mesh = make_mesh(jax.devices()[:2])
    joined = variables_of(MODEL)

    def compiled(rows, limit):
        device(limit)
        tokens = np.zeros((rows, T), np.uint16)
        batch = batch_placer(mesh)({"inputs": tokens, "targets": tokens})
        return Fitted(make_eval_step(MODEL, mesh), mesh, "scoring").compiled(joined, batch), batch

    program, batch = compiled(4, 2**30)
    found = program.memory_analysis()
    need = found.temp_size_in_bytes + found.output_size_in_bytes
    assert program(joined, batch)["nll"].shape == (4, T)
    with pytest.raises(UserError, match="scoring needs .* GiB and the device has") as caught:
        compiled(16, need)
    assert re.search(r"--eval.device-batch-tokens 32 needs", str(caught.value))
    compiled(4, need)
    with pytest.raises(UserError, match="not even one text at a time fits"):
        compiled(4, 1)


def test_each_shape_is_compared_once(device):
    mesh, calls, joined = make_mesh(jax.devices()[:1]), [], variables_of(MODEL)
    step = make_eval_step(MODEL, mesh)
    counted = SimpleNamespace(lower=lambda *args: calls.append(1) or step.lower(*args))
    fitted = Fitted(counted, mesh, "scoring")
    for rows in (2, 4, 2, 4):
        tokens = np.zeros((rows, T), np.uint16)
        batch = batch_placer(mesh)({"inputs": tokens, "targets": tokens})
        np.testing.assert_array_equal(fitted(joined, batch)["nll"], step(joined, batch)["nll"])
    assert len(calls) == 2


def calibrated(config, variables, mesh):
    second_moments(config, variables, stream_of(random_tokens(99)), 4 * T, mesh)


def continued(config, variables, mesh):
    generate(config.model, variables, mesh, Letters(), "the", seq_len=T, max_tokens=3)


def likelihoods(config, variables, mesh):
    LanguageModel(config, variables, Letters(), mesh).loglikelihood([("a", "b")])


def texts(config, variables, mesh):
    LanguageModel(config, variables, Letters(), mesh).generate(["a"] * 4, [], 3)


def selections(config, variables, mesh):
    windows = standard_windows(99, T, 0)
    piece = Slice(stream_of(random_tokens(99)), windows, 2, mesh, [0], config.model, variables)
    next(piece.selections(lambda done, total: None))


WORK = {
    calibrated: (MODEL, "calibrating needs"),
    continued: (MODEL, "generating needs"),
    likelihoods: (MODEL, "scoring needs"),
    texts: (MODEL, "generating needs"),
    selections: (CODED, "studying needs"),
}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_all_work_is_compared_before_it_runs(work, device):
    model, message = WORK[work]
    mesh, variables = make_mesh(jax.devices()[:1]), variables_of(model)
    config = Config(
        model=model, data=DataConfig(seq_len=T), eval=EvalConfig(device_batch_tokens=2 * T)
    )
    device(1)
    with pytest.raises(UserError, match=f"{message} .* GiB and the device has 9.31e-10 GiB left"):
        work(config, variables, mesh)
    device(2**30)
    work(config, variables, mesh)


def test_memory_of_devices():
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 7, "bytes_in_use": 1}

    assert memory.device_memory(Device()) == 7
    assert 2**20 < 8 * memory.device_memory(jax.devices()[0]) < 2**50


def test_memory_that_runs_out_later_is_said_with_what_the_device_has(monkeypatch):
    stats = {"bytes_limit": 80 * 2**30, "bytes_in_use": 3 * 2**30}
    device = SimpleNamespace(memory_stats=lambda: stats)
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore")
    assert re.search(r"allocating 7 bytes; the machine has \S+ GiB left; lower", one_line(error))
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    said = "allocating 7 bytes; the device has 80 GiB, of which 3 GiB are in use; lower"
    assert said in one_line(error)
