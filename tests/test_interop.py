"""The scripts' checkpoints: imported weights against an oracle that reads the originals, and every
file and mistake.
"""

import dataclasses
import json
import os
import re
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sngpt_jax import evaluate, interop, sample
from sngpt_jax.base import cli
from sngpt_jax.base.errors import UserError
from sngpt_jax.cluster.mesh import make_mesh
from sngpt_jax.config import ModelConfig
from sngpt_jax.config.recipe import load
from sngpt_jax.data.shards import open_dataset
from sngpt_jax.weights.source import load_model
from sngpt_jax.weights.state_dict_files import InteropError, read_state_dict
from sngpt_jax.weights.torch_checkpoints import export_state_dict, import_state_dict
from tests import golf_oracle, tiny_run

SIZE = {"vocab_size": 96, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 24}
PLAIN_HASH = {"bigram_buckets": 40, "bigram_dim": 12}

LIKE_333 = ModelConfig(
    **SIZE,
    **PLAIN_HASH,
    num_layers=5,
    mlp_dim=88,
    xsa_layers=2,
    rope_base=50_000.0,
    smear="after_norm",
    logit_soft_cap=5.0,
)
LIKE_465 = ModelConfig(**SIZE, **PLAIN_HASH, num_layers=4, mlp_dim=96, smear="after_norm")
LIKE_740 = ModelConfig(
    **SIZE,
    num_layers=3,
    mlp_dim=64,
    mlp_activation="leaky_relu2",
    xsa_layers=3,
    rope_dims=4,
    ln_scale=True,
    smear="before_norm",
    bigram_buckets=32,
    bigram_dim=12,
    bigram_hash="sum",
    bigram_init_std=1.0,
    bigram_scale_init=0.0,
)
LIKE_1573 = ModelConfig(
    **SIZE,
    **PLAIN_HASH,
    num_layers=6,
    mlp_dim=96,
    mlp_activation="leaky_relu2",
    xsa_layers=2,
    rope_dims=4,
    rope_ntk_len=10,
    ln_scale=True,
    smear="after_norm",
    smear_mask_bos=True,
    attention_gate=True,
    value_residual=True,
    value_embed_layers=(5, 4),
    value_embed_dim=12,
    recycle_layers=(1, 2, 1),
)
SYSTEMS = pytest.mark.parametrize(
    ("config", "dialect"),
    [(LIKE_333, "plain"), (LIKE_465, "plain"), (LIKE_740, "plain"), (LIKE_1573, "banked")],
    ids=["333", "465", "740", "1573"],
)


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
        assert found[name].dtype == np.float32


# ---------------------------------------------------------------------------------------------- values


@SYSTEMS
def test_imported_model_computes_what_the_script_did(config, dialect):
    state = golf_oracle.random_state(config, dialect, seed=1)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (2, 20))
    tokens[:, [0, 7]] = config.bos_id
    model = import_state_dict(state, config)
    logits = model(jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golf_oracle.logits(state, config, tokens), atol=1e-4)


@SYSTEMS
def test_the_oracle_feels_every_tensor(config, dialect):
    """A tensor that the oracle passed over would be compared with nothing."""
    state = golf_oracle.random_state(config, dialect, seed=3)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 12))
    before = golf_oracle.logits(state, config, tokens)
    for name, tensor in state.items():
        changed = golf_oracle.logits({**state, name: 0.5 * tensor + 0.1}, config, tokens)
        assert (np.abs(changed - before).max() > 1e-6) == (name != "blocks.0.attn.vr_lambda"), name


@SYSTEMS
def test_export_gives_back_every_bit(config, dialect):
    state = golf_oracle.random_state(config, dialect, seed=5)
    equal(export_state_dict(import_state_dict(state, config)), state)


@settings(max_examples=15, deadline=None)
@given(
    num_layers=st.integers(1, 5),
    smear=st.sampled_from(["none", "after_norm", "before_norm"]),
    bigram=st.sampled_from(["none", "xor", "sum"]),
    bigram_scale=st.sampled_from([0.0, 0.05]),
    gate=st.booleans(),
    residual=st.booleans(),
    embed_layers=st.sets(st.integers(0, 4)),
    recycled=st.lists(st.integers(0, 1), max_size=3),
)
def test_any_combination_survives_the_round_trip(
    num_layers, smear, bigram, bigram_scale, gate, residual, embed_layers, recycled
):
    config = ModelConfig(
        **SIZE,
        num_layers=num_layers,
        mlp_dim=48,
        smear=smear,
        bigram_buckets=0 if bigram == "none" else 16,
        bigram_hash="sum" if bigram == "sum" else "xor",
        bigram_scale_init=bigram_scale,
        attention_gate=gate,
        value_residual=residual,
        value_embed_layers=tuple(layer for layer in embed_layers if layer < num_layers),
        recycle_layers=tuple(layer for layer in recycled if layer < num_layers // 2),
    )
    own_script = gate or residual or config.value_embed_layers or config.recycle_layers
    state = golf_oracle.random_state(config, "banked" if own_script else "plain", seed=6)
    equal(export_state_dict(import_state_dict(state, config)), state)


def test_numbers_that_are_not_finite_in_float32_are_refused():
    state = golf_oracle.random_state(LIKE_465, "plain", seed=8)
    state["tok_emb.weight"] = np.full_like(state["tok_emb.weight"], np.nan)
    state["smear.gate"] = np.full(state["smear.gate"].shape, 1e300)
    with pytest.raises(InteropError, match=r"not finite in float32: tok_emb.weight, smear.gate$"):
        import_state_dict(state, LIKE_465)


def test_the_layout_is_read_from_the_names():
    """A model of one script in the layout of another: the same matrices, stacked."""
    banked = golf_oracle.random_state(LIKE_465, "banked", seed=7)
    plain = export_state_dict(import_state_dict(banked, LIKE_465))
    np.testing.assert_array_equal(plain["blocks.1.attn.c_v.weight"], banked["kv_bank"][4 + 1])
    np.testing.assert_array_equal(plain["blocks.3.attn.proj.weight"], banked["qo_bank"][4 + 3])
    np.testing.assert_array_equal(plain["blocks.2.mlp.fc.weight"], banked["mlp_up_bank"][2])
    assert not any("bank" in name for name in plain)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(dtype):
    state = {
        name: tensor.astype(dtype)
        for name, tensor in golf_oracle.random_state(LIKE_740, "plain", seed=8).items()
    }
    found = export_state_dict(import_state_dict(state, LIKE_740))
    equal(found, {name: tensor.astype(np.float32) for name, tensor in state.items()})
    equal(export_state_dict(import_state_dict(jax.tree.map(np.asarray, found), LIKE_740)), found)


def test_one_error_lists_every_tensor_at_fault():
    state = golf_oracle.random_state(LIKE_1573, "banked", seed=9)
    del state["smear.gate"], state["ve_layer_scales.1"]
    state["skip_weights"] = state["skip_weights"][:2]
    state["kv_bank"] = state["kv_bank"][:11].astype(np.int8)
    state["rotary.inv_freq"] = np.zeros(2, np.float32)
    with pytest.raises(InteropError) as error:
        import_state_dict(state, LIKE_1573)
    assert str(error.value).split(": ", 1)[1].split("; ") == [
        "skip_weights has shape [2, 32], expected [3, 32]",
        "smear.gate [32] is missing",
        "ve_layer_scales.1 [1] is missing",
        "kv_bank has shape [11, 16, 32], expected [12, 16, 32]",
        "kv_bank is int8, expected one of float16, bfloat16, float32, float64",
        "rotary.inv_freq [2] is not a tensor of this model",
    ]


# ---------------------------------------------------------------------------------------------- files


def write_file(path: Path, state: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **state)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.tensor(tensor) for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth", ".bin"])
def test_files_are_read_as_they_were_written(tmp_path, suffix):
    state = golf_oracle.random_state(LIKE_1573, "banked", seed=10)
    equal(read_state_dict(write_file(tmp_path / f"model{suffix}", state)), state)


def test_bfloat16_files(tmp_path):
    tensor = np.array([1.5, -2.25, 3e38], ml_dtypes.bfloat16)
    safetensors.numpy.save_file({"x": tensor}, tmp_path / "x.safetensors")
    found = read_state_dict(tmp_path / "x.safetensors")["x"]
    np.testing.assert_array_equal(found.astype(np.float32), tensor.astype(np.float32))
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.tensor(tensor.astype(np.float32)).bfloat16()}, tmp_path / "x.pt")
    np.testing.assert_array_equal(
        read_state_dict(tmp_path / "x.pt")["x"], tensor.astype(np.float32)
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    path = write_file(
        tmp_path / f"model{suffix}", golf_oracle.random_state(LIKE_740, "plain", seed=11)
    )
    content = path.read_bytes()
    for damaged in (
        b"",
        b"nonsense",
        content[: len(content) // 2],
        content[:-40],
        content[:20] + b"\xff" * 40 + content[60:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InteropError, match="cannot be read as a") as error:
            read_state_dict(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_file(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    for name, reason in [
        ("absent.npz", "cannot be read: No such file"),
        ("folder.npz", "cannot be read: not a plain file"),
        ("pipe.safetensors", "cannot be read: not a plain file"),
        ("model.ckpt", r"expected a file named \*.safetensors, \*.npz, \*.pt"),
        ("array.npz", "not a zip archive"),
        ("objects.npz", "Object arrays cannot be loaded"),
    ]:
        with pytest.raises(InteropError, match=reason):
            read_state_dict(tmp_path / name)


def test_archives_that_claim_more_than_they_hold(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(10_000_000, np.int8))
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    with (
        zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive,
        archive.open("x.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
    for name, reason in [
        ("bomb.npz", "unpacks to 10,000,128 bytes, more than 64 times"),
        ("claim.npz", "does not hold the array"),
    ]:
        with pytest.raises(InteropError, match=reason):
            read_state_dict(tmp_path / name)


def test_pt_files_of_something_else(tmp_path):
    torch = pytest.importorskip("torch")
    for value, reason in [
        (torch.ones(2), "holds a Tensor, expected a dict of tensors"),
        (
            {"model": {"x": torch.ones(2)}, "step": 3},
            "'model' is of type dict, 'step' is of type int; save the model's state_dict",
        ),
        ({0: torch.ones(2)}, "0 is of type Tensor"),
        # a class that weights_only does not allow
        (Path("code"), "cannot be read as a .pt file of tensors alone"),
    ]:
        torch.save(value, tmp_path / "model.pt")
        with pytest.raises(InteropError, match=reason):
            read_state_dict(tmp_path / "model.pt")


def test_pt_files_without_pytorch(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        InteropError, match="model.pt: reading it needs PyTorch.*-m pip install torch"
    ):
        read_state_dict(tmp_path / "model.pt")


# ---------------------------------------------------------------------------------------------- commands

# on top of tests/tiny_run.py's recipe
OVERRIDES = ["--model.smear", "before_norm", "--model.value-residual", "True"]
OVERRIDES += ["--model.recycle-layers", "0", "--model.bigram-buckets", "16"]
AVERAGES = ["--optim.ema-decay", "0.9", "--optim.swa-every", "2"]


def status(arguments: list[object], capsys) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as exit_, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["interop", *map(str, arguments)])
        cli.run(interop.main)
    printed = capsys.readouterr()
    return exit_.value.code, printed.out, printed.err


@pytest.fixture
def checkpoint_file(tiny_recipe, tmp_path) -> tuple[Path, dict[str, np.ndarray], ModelConfig]:
    config = dataclasses.replace(
        load(str(tiny_recipe)).model,
        smear="before_norm",
        value_residual=True,
        recycle_layers=(0,),
        bigram_buckets=16,
    )
    state = golf_oracle.random_state(config, "banked", seed=12)
    return write_file(tmp_path / "final_model.safetensors", state), state, config


def test_import_then_export(tiny_recipe, checkpoint_file, tmp_path, capsys):
    file, state, _ = checkpoint_file
    run_dir = tmp_path / "run"
    arguments = [
        "import",
        file,
        "--config",
        tiny_recipe,
        "--run-dir",
        run_dir,
        *OVERRIDES,
        *AVERAGES,
    ]
    code, out, err = status(arguments, capsys)
    assert code == 0, err
    assert f"imported\n  from        {file}\n  checkpoint  {run_dir}/checkpoints/00000000\n" in out
    assert (run_dir / "tokenizer.model").read_bytes() == (
        tiny_recipe.parent / "data" / "tokenizer.model"
    ).read_bytes()

    with pytest.raises(UserError, match="no snapshot was taken up to step 0"):
        load_model(run_dir, make_mesh(), weights="swa")

    total = sum(tensor.size for tensor in state.values())
    for weights in ("final", "ema"):
        out_file = tmp_path / f"{weights}.safetensors"
        code, out, err = status(
            ["export", "--run", run_dir, "--out", out_file, "--weights", weights], capsys
        )
        assert code == 0, err
        assert f"{len(state)} tensors, {total:,} parameters of step 0, {weights} weights" in out
        equal(safetensors.numpy.load_file(out_file), state)

    code, out, err = status(arguments, capsys)
    assert (code, out) == (2, "")
    assert "checkpoints: holds checkpoints already; choose another --run-dir" in err


@pytest.mark.slow
def test_imported_runs_are_scored_and_trained_on(tiny_recipe, checkpoint_file, tmp_path, capsys):
    """`train` validates before its first step: the loss is the one that the script's model has on
    the same tokens.
    """
    file, state, config = checkpoint_file
    run_dir = tmp_path / "run"
    recipe = [
        "--config",
        tiny_recipe,
        "--run-dir",
        run_dir,
        *OVERRIDES,
        "--train.steps",
        "4",
        "--eval.tokens",
        "1024",
    ]
    assert status(["import", file, *recipe], capsys)[0] == 0

    stream = (
        open_dataset(tiny_recipe.parent / "data", config.vocab_size)
        .val.take(0, 1025)
        .astype(np.int64)
    )
    logits = golf_oracle.logits(state, config, stream[:-1].reshape(-1, 32))
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = -np.mean(np.take_along_axis(log_p.reshape(1024, -1), stream[1:, None], axis=1))

    scored = tiny_run.run("evaluate", "--run", run_dir, "--json", "--tokens", 1024)
    assert json.loads(scored.stdout)["loss"] == pytest.approx(expected, abs=1e-5)
    done = tiny_run.run("train", *recipe)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["val_loss"] == pytest.approx(expected, abs=1e-5)
    assert [line["val_loss"] for line in lines if "val_loss" in line][-1] < expected


def test_a_run_without_a_tokenizer_says_so(tiny_recipe, checkpoint_file, tmp_path, capsys):
    arguments = [
        "import",
        checkpoint_file[0],
        "--config",
        tiny_recipe,
        *OVERRIDES,
        "--data.dir",
        tmp_path / "none",
    ]
    code, _, err = status([*arguments, "--run-dir", tmp_path / "bare"], capsys)
    assert code == 0
    assert (
        len(
            [line for line in err.splitlines() if line.startswith("the run will keep no tokenizer")]
        )
        == 1
    )
    assert not list((tmp_path / "bare").glob("tokenizer*"))
    data = tiny_recipe.parent / "data"
    assert (
        evaluate.main(
            [
                "--run",
                str(tmp_path / "bare"),
                "--data",
                str(data),
                "--tokens",
                "512",
                "--weights",
                "final",
            ]
        )
        == 0
    )
    assert "bits/byte" in capsys.readouterr().out
    with pytest.raises(UserError, match="keeps no tokenizer; import its weights with --tokenizer"):
        sample.main(["--run", str(tmp_path / "bare"), "--weights", "final"])
    assert load_model(tmp_path / "bare", make_mesh()).step == 0

    tokenizer = tiny_recipe.parent / "data" / "tokenizer.model"
    code, _, err = status(
        [*arguments, "--run-dir", tmp_path / "given", "--tokenizer", tokenizer], capsys
    )
    assert (code, "keep no tokenizer" in err) == (0, False)
    assert (tmp_path / "given" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


TOO_LARGE = ["--tokenizer", "{tokenizer}", "--model.vocab-size", "319"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["import", "{file}", "--config", "{recipe}", "--run-dir", "{tmp}/run"],
            r"recycle_mods.0.scale \[32\] is not a tensor of this model",
        ),
        (
            ["import", "{tmp}/absent.npz", "--config", "{recipe}", "--run-dir", "{tmp}/run"],
            "absent.npz: cannot be read: No such",
        ),
        (
            ["import", "{tmp}", "--config", "{recipe}", "--run-dir", "{tmp}/run"],
            "expected a file named",
        ),
        (
            ["import", "{file}", "--config", "{recipe}", "--run-dir", "{tmp}/run", *TOO_LARGE],
            "tokenizer.model: expected at most model.vocab_size = 319 tokens, found 320",
        ),
        (
            ["export", "--run", "{tmp}/run", "--out", "{tmp}/x.safetensors"],
            "run: not a run directory",
        ),
        (
            ["export", "--run", "{tmp}/run", "--out", "{tmp}/x.pt"],
            "x.pt: expected a file named \\*.safetensors",
        ),
        (["convert"], "expected import or export after sngpt_jax.interop, found convert"),
        ([], "found nothing"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_run(
    tiny_recipe, checkpoint_file, tmp_path, capsys, arguments, reason
):
    tokenizer = tiny_recipe.parent / "data" / "tokenizer.model"
    names = {
        "file": checkpoint_file[0],
        "recipe": tiny_recipe,
        "tmp": tmp_path,
        "tokenizer": tokenizer,
    }
    code, out, err = status([argument.format(**names) for argument in arguments], capsys)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert re.search(reason, line)
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    assert interop.main(["--help"]) == 0
    assert "interop import" in capsys.readouterr().out
    for command, option in (("import", "--run-dir"), ("export", "--weights")):
        with pytest.raises(SystemExit) as exit_:
            interop.main([command, "--help"])
        assert exit_.value.code == 0
        assert option in capsys.readouterr().out
