"""The step's benchmark: its figures, its refusals, and the equality of the model in PyTorch."""

import json
from contextlib import closing
from dataclasses import replace

import jax
import pytest

from sngpt_jax.base.errors import UserError
from sngpt_jax.bench import __main__ as command
from sngpt_jax.bench import step as bench
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from tests import golf_oracle

TINY = [
    *["--config", "quickstart", "--model.vocab-size", "64", "--model.num-layers", "2"],
    *["--model.d-model", "16", "--model.mlp-dim", "32", "--data.batch-tokens", "128"],
    *["--data.seq-len", "16", "--train.device-batch-tokens", "16"],
    *["--train.compilation-cache", "", "--rounds", "3", "--steps", "2"],
]


@pytest.fixture(autouse=True)
def the_heap_as_it_is(monkeypatch):
    """The command would change the process of all tests."""
    monkeypatch.setattr(bench, "keep_working_memory", lambda: None)


def test_the_step_alone(capsys):
    assert command.main([*TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["devices"] == 8
    assert result["speed"].keys() == {"jax"}
    speed = result["speed"]["jax"]
    assert 0 < speed["tok_per_s_low"] <= speed["tok_per_s"] <= speed["tok_per_s_high"]
    assert 0 <= result["input_wait_share"] <= result["host_share"] < 1
    assert result["mfu"] is None  # nobody knows the peak of a CPU


XLA = "--train.xla-options"
SPARSE = ["--config", "quickstart_cayley", "--against", "torch"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*TINY, "--rounds", "0"], "--rounds must be 1 or more"),
        ([*TINY, XLA, "xla_nonsense=1"], "No such compile option: 'xla_nonsense'"),
        ([*TINY, XLA, "xla_cpu_enable_fast_math=maybe"], "'maybe' is not a valid bool value"),
        ([*TINY, XLA, "O3"], "'O3' is not of the form xla_NAME=VALUE"),
        (SPARSE, "model.family = pre_norm is not written in PyTorch"),
    ],
)
def test_mistakes_are_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        command.main(arguments)


def test_without_pytorch(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="PyTorch is not installed; run: .* -m pip install torch"):
        command.main([*TINY, "--against", "torch"])


SIZE = {"vocab_size": 50, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 32}
SIZE["max_seq_len"] = 32
OTHERS = {"mlp_activation": "gelu", "ln_scale": False, "logit_soft_cap": 0.0}
ENDS = {"value_embed_layers": (3, 2), "recycle_layers": (1, 0)}
MODELS = {
    "plain": ModelConfig(**SIZE, num_layers=2),
    "740": golf_oracle.like("740", **SIZE, num_layers=2, xsa_layers=2, rope_dims=2),
    "1573": golf_oracle.like("1573", **SIZE, **ENDS, **OTHERS, num_layers=4),
}


def recipe(model, **optim):
    """Two microbatches, and rates so high that four steps show every parameter."""
    rates = OptimConfig(
        muon_weight_decay=0.1,
        adam_weight_decay=0.1,
        projection_rule="adam",
        grad_clip=0.5,
        newton_schulz_dtype="float32",
        muon_momentum_warmup_steps=3,
        warmup_steps=1,
        warmdown_fraction=1.0,
    )
    return Config(
        model=model,
        optim=replace(rates, **optim),
        data=DataConfig(batch_tokens=128, seq_len=16),
        train=TrainConfig(steps=20, device_batch_tokens=64),
    )


@pytest.mark.parametrize("name", MODELS)
def test_pytorch_trains_the_same_model(name):
    pytest.importorskip("torch")
    config = recipe(MODELS[name])
    ours = bench.OurStep(config, make_mesh(jax.devices()[:1]))
    with closing(ours.loader):
        theirs = bench.TheirStep(config, ours.weights, compiled=False)
        expected = ours(6).losses
    assert theirs(6).losses == pytest.approx(expected, rel=2e-5)
    # they do not agree because nothing moves
    assert max(abs(loss - expected[0]) for loss in expected) > 0.05


def test_another_model_is_found_out_in_bfloat16_too(monkeypatch):
    pytest.importorskip("torch")
    from sngpt_jax.bench.torch_model import Attention

    config = recipe(replace(MODELS["plain"], compute_dtype="bfloat16"), warmup_steps=0)
    mesh = make_mesh(jax.devices()[:1])
    same = bench.first_losses(config, mesh)
    assert same["torch"] == pytest.approx(same["jax"], abs=2e-5)
    monkeypatch.setattr(Attention, "rotate", lambda self, x_BTHh, cos, sin: x_BTHh)
    with pytest.raises(UserError, match="is not the same model: its first losses are"):
        bench.first_losses(config, mesh)
