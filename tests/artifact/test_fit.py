"""The search for the policy of least error under a limit."""

import re
from dataclasses import replace

import numpy as np
import pytest

from sngpt_jax.artifact import fit
from sngpt_jax.artifact import sngpt_file as artifact
from sngpt_jax.artifact.account import relative_error
from sngpt_jax.artifact.pipeline import quantize_tensors
from sngpt_jax.base.errors import UserError
from sngpt_jax.config import Config, ExportConfig, ModelConfig, OptimConfig
from sngpt_jax.config.checks import validate

CONFIG = Config(
    model=ModelConfig(num_layers=1),
    export=ExportConfig(mlp_bits=5, packed=True, codec="lzma", codec_level=9),
)


UP = "blocks/0/mlp/up"


def tensors(tails="none"):
    rng = np.random.default_rng(0)
    draw = rng.standard_normal if tails == "none" else lambda shape: rng.standard_t(3, shape)
    shapes = {UP: (256, 512), "blocks/0/attn/query": (256, 256), "embed/table": (64, 256)}
    return {name: np.float32(draw(shape)) for name, shape in shapes.items()}


def size_and_error(found, config, moments=None):
    stored = quantize_tensors(found, config, moments)
    encoded = artifact.encode({}, stored, fit.storage_of(config.export))
    return len(encoded.data), relative_error(found, stored)


def search(found, config, limit, tell=lambda line: None, moments=None):
    return fit.search(found, config, lambda config: {}, limit, tell, moments)


@pytest.mark.parametrize("tails", ["none", "heavy"])
@pytest.mark.parametrize("limit", [90_000, 130_000, 180_000])
def test_the_policy_fits_and_is_the_best_that_was_tried(tails, limit):
    found, said = tensors(tails), []
    config = search(found, CONFIG, limit, said.append)
    size, error = size_and_error(found, config)
    assert limit * 0.94 < size <= limit
    fitting = [re.search(r"rel. MSE (\S+)", line)[1] for line in said if line.endswith("fits")]
    assert error == pytest.approx(min(map(float, fitting)), rel=1e-3)
    assert len(said) > fit.BISECTIONS
    assert limit == 180_000 or any(line.endswith("too many") for line in said)
    assert config.model == CONFIG.model
    assert config.export.codec == "rans" and not config.export.packed
    for bits in (3, 4, 5, 6, 7):  # a grid by the row's largest magnitude that fits loses no less
        export = replace(config.export, clip="row_max", mlp_bits=bits, attention_bits=bits)
        other_size, other_error = size_and_error(found, replace(config, export=export))
        assert other_size > limit or other_error >= error * 0.999


def test_what_it_finds_can_be_read_whatever_the_recipe_says():
    """Fields that do not go with the policy that is found are not carried over."""
    export = ExportConfig(
        embed_bits=4,
        table_bits=3,
        late_key_layers=1,
        clip="search",
        table_clip="search",
        clip_scope="matrix",
        clip_floor=9.0,
        prune_fraction=0.5,
        codes="full",
        packed=True,
        codec="zstd",
    )
    recipe = Config(
        ModelConfig(num_layers=1), OptimConfig(warmdown_fraction=0.5, qat_below=0.5), export=export
    )
    found = search(tensors(), validate(recipe), 130_000)
    x = validate(found).export
    assert (x.clip, x.embed_bits, x.late_key_layers) == ("sd", 8, 0)
    assert (x.clip_floor, x.prune_fraction) == (0, 0)
    assert size_and_error(tensors(), found)[1] < 0.01, "far below the recipe's own policy"


def test_the_recipes_own_policy_and_half_precision_are_among_the_tried():
    export = ExportConfig(mlp_bits=8, attention_bits=8, codec="zstd", codec_level=3)
    own = replace(CONFIG, export=export)
    said = []
    config = search(tensors(), own, 10_000_000, said.append)
    assert config.export.mlp_bits == config.export.embed_bits == 16
    assert "8 bits mlp, 8 attention, row_max, zstd" in said[0]


def test_with_gptq_what_is_rounded_by_it_fits():
    """On strongly correlated inputs its codes take more room than the nearest codes do."""
    mixing = np.random.default_rng(3).standard_normal((128, 150))
    moments, found = {UP: mixing @ mixing.T}, {UP: tensors()[UP][:128]}
    gptq = replace(CONFIG, export=replace(CONFIG.export, gptq=True, passthrough_size=0))
    config = search(found, gptq, 20_000, moments=moments)
    assert config.export.gptq
    assert 20_000 * 0.94 < size_and_error(found, config, moments)[0] <= 20_000


def test_a_limit_that_nothing_fits_is_one_line():
    with pytest.raises(UserError, match=r"no policy fits into 1,000 bytes .* trials takes \d"):
        search(tensors(), CONFIG, 1000)
