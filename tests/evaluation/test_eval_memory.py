"""Scoring that does not fit the device's memory."""

import re

import jax
import numpy as np
import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import batch_placer, make_mesh
from sngpt_jax.config import ModelConfig
from sngpt_jax.evaluation import memory as scoring_memory
from sngpt_jax.evaluation.step import make_eval_step
from sngpt_jax.model.forward import init_variables, join

MODEL = ModelConfig(
    vocab_size=32, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, mlp_dim=32, max_seq_len=16
)


def test_scoring_names_the_batch_that_fits_before_it_begins(monkeypatch):
    mesh = make_mesh(jax.devices()[:2])
    scoring = make_eval_step(MODEL, mesh)
    joined = join(*init_variables(MODEL, jax.random.key(0)))

    def compiled(rows, limit):
        tokens = np.zeros((rows, 16), np.uint16)
        batch = batch_placer(mesh)({"inputs": tokens, "targets": tokens})
        monkeypatch.setattr(scoring_memory, "device_memory", lambda device: limit)
        return scoring_memory.compile_for(scoring, joined, batch, mesh), batch

    program, batch = compiled(4, 2**30)
    memory = program.memory_analysis()
    need = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert program(joined, batch)["nll"].shape == (4, 16)
    with pytest.raises(UserError, match="scoring needs .* GiB and the device has") as caught:
        compiled(16, need)
    assert re.search(r"--eval.device-batch-tokens 32 needs", str(caught.value))
    compiled(4, need)
    with pytest.raises(UserError, match="not even one sequence at a time fits"):
        compiled(4, 1)
