"""Custom kernels are compared with XLA before their first use. A wrong one is not used.

No GPU is here. XLA's functions stand for the kernels, right or made wrong on purpose; one test
interprets the true kernel.
"""

import json
import logging
from functools import partial
from pathlib import Path

import jax
import pytest
from sngpt_kernels import dispatch, parity
from sngpt_kernels.cayley import pallas_triton as cayley_kernels
from sngpt_kernels.cayley import xla as cayley_xla
from sngpt_kernels.epilogue import pallas_triton as epilogue_kernels
from sngpt_kernels.epilogue import xla as epilogue_xla
from sngpt_kernels.mlp import pallas_triton as mlp_kernels
from sngpt_kernels.rotary import pallas_triton as rotary_kernels
from sngpt_kernels.stream import pallas_triton as stream_kernels
from sngpt_kernels.xsa import api as xsa_api
from sngpt_kernels.xsa import libraries
from sngpt_kernels.xsa import pallas_triton as xsa_kernels
from sngpt_kernels.xsa import xla as xsa_xla

from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster import processes
from sngpt_jax.cluster.layout import Layout
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import Config, TrainConfig, changed
from sngpt_jax.config.recipe import load
from sngpt_jax.run import environment
from sngpt_jax.run.console import Console
from sngpt_jax.training import compiler, loop, trainer, trust
from sngpt_jax.weights import source

INTERPRETED = partial(xsa_kernels.attention, interpret=True)
SMALL = {  # a kernel's module and function, and the choices of a model that runs it
    "rotary": (rotary_kernels, "prepare", {"rotary": "auto", "attention": "xla"}),
    "stream": (stream_kernels, "sum_norm", {"stream": "auto", "attention": "xla"}),
    "epilogue": (epilogue_kernels, "finish", {"xsa_layers": 1, "attention_gate": True}),
    "mlp": (
        mlp_kernels,
        "residual_mlp",
        {"mlp": "pallas_triton", "attention": "xla", "d_model": 128, "mlp_dim": 128}
        | {"compute_dtype": "bfloat16"},
    ),
}
FINISH = epilogue_kernels.finish


def attention(q, k, v, scale, factor=1.0):
    return factor * xsa_xla.causal_attention(q, k, v, scale)


def broken(*args):
    raise RuntimeError("no kernel image is available\nfor this device")


def wrong_code(*args):
    x_hat, ids = cayley_xla.encode_decode(*args)
    return 0.5 * x_hat, ids


WRONG = partial(attention, factor=1.25)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A device on which the kernels are chosen. Afterwards they are trusted again."""
    monkeypatch.setattr(dispatch, "check_nvidia", lambda *_: None)
    monkeypatch.setattr(xsa_api, "SCORES_BYTES", -1)
    monkeypatch.setattr(xsa_kernels, "attention", attention)
    monkeypatch.setattr(cayley_kernels, "encode_decode", cayley_xla.encode_decode)
    monkeypatch.setattr(epilogue_kernels, "finish", epilogue_xla.finish)
    monkeypatch.setattr(cayley_kernels, "check", lambda *_: None)
    dispatch.log_choice.cache_clear()
    yield
    for name in trust.OPERATIONS:
        dispatch.distrust(name, "")


@pytest.fixture
def config(tmp_path):
    sections = {
        "model": {
            "d_model": 32,
            "num_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 2,
            "rotary": "xla",
            "stream": "xla",
        },
        "data": {"seq_len": 16},
        "train": {"compilation_cache": str(tmp_path / "cache")},
    }
    return changed(Config(), **sections)


@pytest.fixture
def agreeing(monkeypatch):
    """Every comparison finds nothing, at once."""
    found = parity.Parity((parity.Difference("value", 0.0, 1.0),), 0.0, 0.0)
    monkeypatch.setattr(parity, "compare", lambda *_, **__: found)


def used(config):
    """The implementation that a model of `config` would run."""
    case = trust._attention(config.model, 2, 16)[0]
    with dispatch.recorded_choices() as choices:
        jax.eval_shape(partial(case.run, implementation=None), *case.abstract())
    return choices


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "kernels").iterdir())


@pytest.mark.parametrize("kernel", [attention, INTERPRETED], ids=["xla", "interpreted"])
def test_a_right_kernel_is_used(kernel, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(xsa_kernels, "attention", kernel)
    with caplog.at_level(logging.INFO):
        assert trust.settle(config, 32, "check") == {"xsa": ""}
    assert "xsa: pallas_triton equals xla within" in caplog.text
    assert used(config) == ["pallas_triton"]
    (path,) = kept(tmp_path)
    facts = json.loads(path.read_text())
    assert facts["problem"] == "" and {"device", "driver", "jax", "kernels", "case"} <= set(facts)


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (WRONG, "its value differs from xla's by 2.5e-01 of the largest"),
        (broken, "it fails with RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_not_used(kernel, problem, config, tmp_path, monkeypatch, caplog):
    """One line names the error and how to report it. Another start reads the verdict."""
    monkeypatch.setattr(xsa_kernels, "attention", kernel)
    for _ in range(2):
        caplog.clear()
        verdicts = trust.settle(config, 32, "check")
        assert verdicts["xsa"].startswith(problem)
        (line,) = (one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING)
        assert line.startswith(f"xsa: pallas_triton is not used: {problem}") and "\n" not in line
        assert f"report it as CONTRIBUTING.md says, with {kept(tmp_path)[0]}" in line
        assert used(config) == ["xla"]
        monkeypatch.setattr(parity, "compare", lambda *_, **__: pytest.fail("compared again"))


def test_modes(config, monkeypatch):
    """`trust` and `off` compare nothing."""
    monkeypatch.setattr(parity, "compare", lambda *_, **__: pytest.fail("compared"))
    assert trust.settle(config, 32, "off") == {} and used(config) == ["xla"]
    assert trust.settle(config, 32, "trust") == {} and used(config) == ["pallas_triton"]
    xla = changed(config, model={"attention": "xla"})
    assert trust.settle(xla, 32, "check") == {}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"problem": 3}', b'"problem"', b"\xff"]
)
def test_a_corrupt_verdict_is_made_again(content, config, tmp_path, agreeing):
    trust.settle(config, 32, "check")
    (path,) = kept(tmp_path)
    path.write_bytes(content)
    assert trust.settle(config, 32, "check") == {"xsa": ""}
    assert kept(tmp_path) == [path] and json.loads(path.read_text())["problem"] == ""


def test_a_folder_that_cannot_be_written_is_no_error(config, tmp_path, caplog, agreeing):
    (tmp_path / "cache").write_text("a file")
    assert trust.settle(config, 32, "check") == {"xsa": ""}
    assert "the next start compares the kernel again" in caplog.text
    without = changed(config, train={"compilation_cache": ""})
    assert trust.settle(without, 32, "check") == {"xsa": ""}


def test_each_version_has_its_own_verdict(config, tmp_path, monkeypatch, agreeing):
    for number, change in enumerate(("", "__version__", "_sources")):
        if change:
            value = (lambda: "other") if change == "_sources" else "other"
            monkeypatch.setattr(trust, change, value)
        trust.settle(config, 32, "check")
        assert len(kept(tmp_path)) == number + 1


def test_a_sparse_code_beside_attention(config, tmp_path, monkeypatch):
    levels = ((5, 4, 0), (8, 4, 8))
    coded = changed(config, model={"levels": levels, "xsa_layers": 1, "family": "pre_norm"})
    monkeypatch.setattr(cayley_kernels, "encode_decode", wrong_code)
    verdicts = trust.settle(coded, 32, "check")
    assert verdicts["xsa"] == "" and verdicts["cayley"].startswith("100.0% of its rows differ")
    assert len(kept(tmp_path)) == 3


def test_a_kernel_of_a_library(config, monkeypatch):
    named = changed(config, model={"attention": "tokamax", "compute_dtype": "bfloat16"})
    monkeypatch.setattr(libraries, "check", lambda *_: None)
    monkeypatch.setattr(libraries, "attention", lambda name, *arrays: WRONG(*arrays))
    assert trust.settle(named, 32, "check")["xsa"].startswith("its value differs")
    (case,) = trust._attention(named.model, 2, 16)
    with pytest.raises(dispatch.CannotServe, match="tokamax is not used: its value differs"):
        jax.eval_shape(partial(case.run, implementation="tokamax"), *case.abstract())


@pytest.mark.parametrize(("factor", "problem"), [(1.0, ""), (1.25, "its value differs")])
@pytest.mark.parametrize("name", SMALL)
def test_other_kernels(name, factor, problem, config, monkeypatch):
    module, function, choices = SMALL[name]
    right = partial(FINISH if name == "epilogue" else getattr(module, function), interpret=True)

    def kernel(*args):
        return jax.tree.map(lambda part: factor * part, right(*args))

    monkeypatch.setattr(module, function, kernel)
    verdicts = trust.settle(changed(config, model=choices), 32, "check")
    assert set(verdicts) == {name, *["xsa"] * (name == "epilogue")}
    assert verdicts[name].startswith(problem) and bool(verdicts[name]) == bool(problem)


def test_process_0_decides(config, monkeypatch):
    """Another process compares nothing and takes its verdict."""
    monkeypatch.setattr(processes, "_layout", Layout("localhost:1", 2, 1, None, "a test"))
    monkeypatch.setattr(processes, "_gather", lambda value: [{"xsa": "it is wrong"}, value])
    monkeypatch.setattr(parity, "compare", lambda *_, **__: pytest.fail("compared"))
    assert trust.settle(config, 32, "check") == {"xsa": "it is wrong"}
    assert used(config) == ["xla"]


def test_a_trained_model_is_checked_in_this_machines_folder(config, monkeypatch):
    """Its config.json does not choose the folder."""
    asked = []
    monkeypatch.setattr(source, "read_config", lambda _: config)
    monkeypatch.setattr(source, "use_compilation_cache", lambda _: None)
    monkeypatch.setattr(trust, "settle", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(source.Shapes, "of", lambda *_: pytest.fail("traced", pytrace=False))
    with pytest.raises(pytest.fail.Exception):
        source.load_model(Path("run"), make_mesh(), kernels="trust")
    ((own, tokens, mode),) = asked
    assert own.train.compilation_cache == TrainConfig.compilation_cache
    assert (tokens, mode) == (config.eval.device_batch_tokens, "trust")


# ---------------------------------------- in a run


@pytest.fixture
def start(tiny_recipe, tmp_path, monkeypatch):
    """Starts the tiny recipe's run up to its first step, with options of the model."""

    def first_step(run, seconds):
        raise StopIteration

    monkeypatch.setattr(loop.Run, "step", first_step)
    monkeypatch.setattr(compiler, "compile_step", lambda lowered: None)
    monkeypatch.setattr(trainer.fitting, "check", lambda shapes, compiled: None)
    monkeypatch.setattr(trainer.fitting, "check_validation", lambda *_: None)
    for change_of_the_process in ("keep_working_memory", "use_compilation_cache"):
        monkeypatch.setattr(compiler, change_of_the_process, lambda *args: None)
    monkeypatch.setattr(trainer, "make_mesh", lambda fsdp: make_mesh(jax.devices()[:1], fsdp))

    def start(kernels="check", **model):
        own = {"compilation_cache": str(tmp_path / "cache")}
        config = changed(
            load(str(tiny_recipe)),
            model={"rotary": "xla", "stream": "xla"} | model,
            train=own,
            eval={"every": 0},
        )
        console = Console(config.train.steps, config.train.max_seconds, quiet=True)
        with console:
            trainer.train(config, tmp_path / "run", console, kernels)

    return start


def test_a_resumed_run_logs_another_verdict(start, tmp_path, monkeypatch, caplog):
    """As on a machine with another driver, where the kernel is wrong."""
    with pytest.raises(StopIteration):
        start()
    assert environment.last(tmp_path / "run")["kernels"] == {"xsa": ""}
    monkeypatch.setattr(xsa_kernels, "attention", WRONG)
    monkeypatch.setattr(trust, "__version__", "other")
    with pytest.raises(StopIteration):
        start()
    changes = [line for line in caplog.messages if "has changed since the run's last start" in line]
    assert len(changes) == 1 and "from right to its value differs" in changes[0]


def test_a_kernel_asked_for_by_name_refuses(start, tmp_path, monkeypatch):
    monkeypatch.setattr(xsa_kernels, "attention", WRONG)
    with pytest.raises(UserError, match="model.attention: pallas_triton is not used: its value"):
        start(attention="pallas_triton")
    with pytest.raises(UserError, match="model.attention: pallas_triton is not used: --kernels o"):
        start("off", attention="pallas_triton")
    assert not (tmp_path / "run").exists()
