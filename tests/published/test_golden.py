"""Golden cases: what the published scripts computed, beside the same computation here.

docs/seeds.md, "Golden cases", describes the files. `pytest tests/published --golden DIR` reads
them. The cases also check `tests.golf_oracle`, on which the tests without cases rely.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sngpt_jax.config import Config, changed
from sngpt_jax.config.recipe import load
from sngpt_jax.model.forward import forward, losses
from sngpt_jax.training.state import init_state
from sngpt_jax.weights.torch_checkpoints import import_state_dict
from tests import golf_oracle
from tests.training import steps

RECIPES = {"465": "golf_10l_int5mlp", "1573": "golf_12l_recycled"}
ROWS = 2  # sequences of a training step


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per file, or one skipped test."""
    (kind,) = {"tiny", "train"} & set(metafunc.fixturenames)
    folder = metafunc.config.getoption("--golden")
    if folder and not any(Path(folder).glob("pr*.npz")):
        raise pytest.UsageError(f"--golden {folder}: no pr*.npz there")
    scripts = {script: Path(folder) / f"pr{script}_{kind}.npz" for script in RECIPES if folder}
    cases = [pytest.param(path, id=name) for name, path in scripts.items() if path.exists()]
    skipped = pytest.mark.skip(reason=f"no case pr…_{kind}.npz: give --golden DIR")
    metafunc.parametrize(kind, cases or [pytest.param(None, marks=skipped)])


def named(arrays: golf_oracle.State, prefix: str) -> golf_oracle.State:
    return {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}


def read(file: Path) -> tuple[golf_oracle.State, golf_oracle.State, Config]:
    """The arrays of a case, its weights, and its script's recipe at the size of the weights."""
    with np.load(file) as case:
        arrays = dict(case)
    w = named(arrays, "w/")
    recipe = load(RECIPES[file.name.removeprefix("pr").partition("_")[0]])
    (V, D), H = w["tok_emb.weight"].shape, len(w["blocks.0.attn.q_gain"])
    banked = "kv_bank" in w
    key = w["kv_bank"][0] if banked else w["blocks.0.attn.c_k.weight"]
    up = w["mlp_up_bank"][0] if banked else w["blocks.0.mlp.fc.weight"]
    buckets, bigram_dim = w["bigram.embed.weight"].shape
    model = {
        "vocab_size": V,
        "d_model": D,
        "num_heads": H,
        "num_kv_heads": len(key) * H // D,
        "mlp_dim": len(up),
        "bigram_buckets": buckets,
        "bigram_dim": bigram_dim,
        # the scripts rotate the same share of a head at every width
        "rope_dims": recipe.model.rope_dims * D // H // recipe.model.head_dim,
    }
    if "ve_shared.embed.weight" in w:
        model["value_embed_dim"] = w["ve_shared.embed.weight"].shape[1]
    return arrays, w, changed(recipe, model={**model, "compute_dtype": "float32"})


def params_of(w: golf_oracle.State, config: Config) -> dict:
    return nnx.to_pure_dict(nnx.state(import_state_dict(w, config.model), nnx.Param))


def test_logits_and_loss_are_the_scripts(tiny: Path) -> None:
    """The case, this model and the oracle differ by float32's rounding, up to 2.2e-5."""
    case, w, config = read(tiny)
    params, tokens = params_of(w, config), case["tokens"]
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    logits = jax.jit(forward(config.model))(params, inputs)
    exact = golf_oracle.logits(w, config.model, tokens[:, :-1])
    for found in (logits, exact):
        np.testing.assert_allclose(found, case["logits"], rtol=0, atol=3e-5)
    loss = jax.jit(losses(config.model))(params, inputs, targets).mean()
    assert float(loss) == pytest.approx(float(case["loss"]), abs=1e-5)


def test_training_takes_the_scripts_steps(train: Path) -> None:
    """All losses, and the weights at the end."""
    case, w, config = read(train)
    size = (len(case["stream"]) - 1) // len(case["losses"])
    config = changed(
        config,
        optim={"newton_schulz_dtype": "float32"},  # as the cases; bfloat16 moves a loss by 1e-3
        data={"batch_tokens": size, "seq_len": size // ROWS, "slices": 1},
        train={"device_batch_tokens": size},
    )
    state = init_state(steps.shapes(config), params_of(w, config))
    for i, loss in enumerate(case["losses"]):
        span = case["stream"][i * size : (i + 1) * size + 1]
        batch = {"inputs": span[:-1].reshape(ROWS, -1), "targets": span[1:].reshape(ROWS, -1)}
        state, metrics = steps.take(config, state, batch)
        assert metrics["loss"] == pytest.approx(loss, abs=2e-5), f"step {i}"
    final = params_of(named(case, "final/"), config)
    for found, expected in zip(*map(jax.tree.leaves, (state.params, final)), strict=True):
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
