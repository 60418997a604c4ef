"""Tensors of an artifact put back into a model, or refused by name."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.artifact.sngpt_file import ArtifactError, Storage
from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ExportConfig,
    ModelConfig,
    OptimConfig,
    changed,
    parse_levels,
    to_json,
)
from sngpt_jax.data.manifest import DataError
from sngpt_jax.model.forward import forward
from sngpt_jax.training.state import Shapes, init_state
from sngpt_jax.weights.quantized_model import host_tensors, quantize_variables
from sngpt_jax.weights.trained_model import (
    TrainedModel,
    from_artifact,
    to_variables,
    tokenizer_beside,
)

SIZE = {"vocab_size": 64, "num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 32}
CODED = ModelConfig(**SIZE, family="pre_norm", num_kv_heads=2, levels=parse_levels("4,2,0;5,2,4"))
COMPACT = ModelConfig(**SIZE, num_kv_heads=1, bigram_buckets=8)
STORAGE = Storage(packed=False, codec="rans", level=3)


EXPORT = ExportConfig(mlp_bits=5, table_bits=6)
CONFIG = Config(COMPACT, OptimConfig(warmdown_fraction=0.5), DataConfig(seq_len=32), export=EXPORT)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def tensors(mesh):
    return host_tensors(init_state(Shapes.of(CONFIG, mesh)).variables())


def written(path, recipe, tensors, **changes):
    about = {"config": json.loads(to_json(recipe)), "tokenizer": None, "version": "0"}
    about |= {"step": 7, "weights": "ema"} | changes
    path.write_bytes(artifact.encode(about, quantize_tensors(tensors, recipe), STORAGE).data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("model", "devices"), [(COMPACT, 1), (COMPACT, 8), (CODED, 8)])
def test_a_model_computes_the_same_from_its_artifact(tmp_path, model, devices):
    """As `quantize_variables` in memory, to the last bit. The step counts of sparse codes start
    again at 0.
    """
    config, mesh = dataclasses.replace(CONFIG, model=model), make_mesh(jax.devices()[:devices])
    variables = init_state(Shapes.of(config, mesh)).variables()
    found = from_artifact(written(tmp_path / "m.sngpt", config, host_tensors(variables)), mesh)
    assert (found.step, found.weights, found.config) == (7, "ema", config)
    assert found.tokenizer_path is None
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    in_memory = quantize_variables(variables, config, None, mesh)
    compute = jax.jit(forward(model))
    logits = compute(found.variables, tokens)
    np.testing.assert_array_equal(logits, compute(in_memory, tokens))
    assert not np.array_equal(logits, compute(variables, tokens))
    leaves = zip(jax.tree.leaves(found.variables), jax.tree.leaves(variables), strict=True)
    assert all(a.dtype == b.dtype and a.sharding == b.sharding for a, b in leaves)


def test_wrong_tensors_are_named(tensors, mesh):
    wrong = dict(tensors)
    del wrong["embed/table"]
    wrong["blocks/0/mlp/up"] = wrong["blocks/0/mlp/up"].T
    wrong["blocks/7/mlp/up"] = np.zeros(1, np.float32)
    with pytest.raises(ArtifactError) as caught:
        to_variables(wrong, CONFIG, mesh)
    for problem in (
        "embed/table is missing",
        "blocks/0/mlp/up is [32, 16], expected [16, 32]",
        "blocks/7/mlp/up is not a tensor of the model",
    ):
        assert problem in str(caught.value)


def config_with(**fields):
    return json.loads(to_json(changed(CONFIG, model=fields)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": 3}, "config: expected an object"),
        ({"config": {}}, "config: missing model"),
        ({"config": config_with(num_heads=3)}, "d_model = 16 is not divisible by .*num_heads = 3"),
        # layers that a file only claims are not traced
        ({"config": config_with(num_layers=250)}, r"\d+ tensors for 250 layers"),
        ({"step": "7"}, "metadata.step: expected int"),
        ({"step": -1}, "step -1"),
        ({"weights": None}, "metadata.weights: expected one of final, swa, ema"),
        ({"tokenizer": ["x"]}, "metadata.tokenizer: expected an object"),
        ({"tokenizer": {"suffix": 3}}, "suffix: expected one of|missing sha256"),
        ({"tokenizer": {"sha256": "0", "suffix": "/../../x"}}, "expected one of .model, .json"),
        ({"tokenizer": {"sha256": 3, "suffix": ".model"}}, "tokenizer.sha256: expected str"),
    ],
)
def test_metadata_that_no_export_writes_are_one_line(tmp_path, tensors, mesh, changes, said):
    path = written(tmp_path / "m.sngpt", CONFIG, tensors, **changes)
    with pytest.raises(ArtifactError, match=f"^{path}: .*{said}.*$"):
        from_artifact(path, mesh)


def test_another_tokenizer_than_the_models_is_refused(tiny_recipe):
    """Beside the model, and in the data that it is to be scored on."""
    data = tiny_recipe.parent / "data"
    config = changed(CONFIG, data={"dir": str(data)}, model={"vocab_size": 320})
    tokenizer = next(data.glob("*.model"))
    right, wrong = file_sha256(tokenizer, DataError), "0" * 64
    model = TrainedModel(
        config, {}, 1, "final", tiny_recipe, tokenizer_path=tokenizer, tokenizer_sha256=right
    )
    assert model.tokenizer().vocab_size == 320 and model.open_data().directory == data
    other = dataclasses.replace(model, tokenizer_sha256=wrong)
    with pytest.raises(ConfigError, match="not the tokenizer of"):
        other.tokenizer()
    with pytest.raises(ConfigError, match="prepared with another tokenizer than the model of"):
        other.open_data()
    assert dataclasses.replace(model, tokenizer_sha256=None).open_data().directory == data


def test_the_tokenizer_lies_beside_the_artifact(tmp_path, tensors, mesh):
    assert tokenizer_beside(tmp_path / "a.b.sngpt", ".json") == tmp_path / "a.b.tokenizer.json"
    kept = {"sha256": "0" * 64, "suffix": ".model"}
    path = written(tmp_path / "m.sngpt", CONFIG, tensors, tokenizer=kept)
    with pytest.raises(ConfigError, match=r"m.sngpt: keeps no tokenizer; put .*m.tokenizer.\*,"):
        from_artifact(path, mesh).tokenizer()
