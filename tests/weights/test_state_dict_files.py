"""Files of tensors: read as they were written, or refused in one line."""

import os
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sngpt_jax.weights.state_dict_files import InteropError, read_state_dict, without_wrappers

_rng = np.random.default_rng(0)
STATE = {
    "blocks.0.attn.c_q.weight": _rng.standard_normal((24, 32), np.float32),
    "qo_bank": _rng.standard_normal((3, 8, 16), np.float32),
    "scale": np.array([0.05], np.float32),
}


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
    found = read_state_dict(write_file(tmp_path / f"model{suffix}", STATE))
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)


def test_bfloat16_files(tmp_path):
    expected = np.float32([1.5, -2.25, 2.0**127])
    path = write_file(tmp_path / "x.safetensors", {"x": expected.astype(ml_dtypes.bfloat16)})
    np.testing.assert_array_equal(np.float32(read_state_dict(path)["x"]), expected)
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.tensor(expected).bfloat16()}, tmp_path / "x.pt")
    np.testing.assert_array_equal(read_state_dict(tmp_path / "x.pt")["x"], expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    path = write_file(tmp_path / f"model{suffix}", STATE)
    content = path.read_bytes()
    cut = [content[: len(content) // 2], content[:-40]]
    for damaged in (b"", b"nonsense", *cut, content[:20] + b"\xff" * 40 + content[60:]):
        path.write_bytes(damaged)
        with pytest.raises(InteropError, match=f"^{path}: cannot be read as a .*$"):
            read_state_dict(path)


def test_what_is_no_checkpoint_file(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "objects.npz", x=np.array([{"a": 1}], dtype=object))
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(10_000_000, np.int8))
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40,)}
    claim = zipfile.ZipFile(tmp_path / "claim.npz", "w")
    with claim as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
    for name, reason in [
        ("absent.npz", "cannot be read: No such file"),
        ("folder.npz", "cannot be read: not a plain file"),
        ("pipe.safetensors", "cannot be read: not a plain file"),
        ("model.ckpt", r"expected a file named \*.safetensors, \*.npz, \*.pt"),
        ("array.npz", "not a zip archive"),
        ("objects.npz", "Object arrays cannot be loaded"),
        ("bomb.npz", "unpacks to 10,000,128 bytes, more than 64 times"),
        ("claim.npz", "does not hold the array"),
    ]:
        with pytest.raises(InteropError, match=reason):
            read_state_dict(tmp_path / name)


def test_pt_files_of_something_else(tmp_path):
    torch = pytest.importorskip("torch")
    for value, reason in [
        (torch.ones(2), "holds a Tensor, expected a dict of tensors"),
        ({"model": {}, "step": 3}, "'model' is of type dict, 'step' is of type int; save"),
        ({0: torch.ones(2)}, "0 is of type Tensor"),
        (Path("a class"), "cannot be read as a .pt file of tensors alone"),
    ]:
        torch.save(value, tmp_path / "model.pt")
        with pytest.raises(InteropError, match=reason):
            read_state_dict(tmp_path / "model.pt")


def test_pt_files_without_pytorch(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InteropError, match="model.pt: reading it needs PyTorch.*pip install torch"):
        read_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_lose_what_wrappers_put_before_them(tmp_path, prefix):
    names = ["tok_emb.weight", "blocks.0.attn.c_q.weight", "module.weight"]
    inside = "blocks.1._orig_mod.mlp.fc.weight"  # a block compiled by itself
    state = {
        f"{prefix}{name}": np.full(2, i, np.float32) for i, name in enumerate([*names, inside])
    }
    safetensors.numpy.save_file(state, tmp_path / "a.safetensors")
    found = read_state_dict(tmp_path / "a.safetensors")
    assert {name: int(array[0]) for name, array in found.items()} == {
        **{name: i for i, name in enumerate(names[:3])},
        "blocks.1.mlp.fc.weight": 3,
    }


def test_names_that_would_become_the_same_keep_their_prefixes():
    state = {"_orig_mod.a": 1, "a": 2}
    assert without_wrappers(state) == state
