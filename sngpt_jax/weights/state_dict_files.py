"""Files of tensors by name, as PyTorch's users keep them, read without running what is in them."""

import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.numpy

from sngpt_jax.base import cli, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import shown

MOST_EXPANSION = 64  # times its own size that an archive unpacks to


class InteropError(UserError):
    """A checkpoint that cannot be read, or is not one of the model asked for; names every tensor
    at fault.
    """


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle, or for one .npy array
        raise ValueError("not a zip archive")
    with zipfile.ZipFile(path) as archive:
        for entry in _entries(path, archive):
            with archive.open(entry) as file:
                _check_array(file, entry)
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _entries(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """What a zip archive holds, which is not many times its own size and held once."""
    entries = archive.infolist()
    size, limit = sum(entry.file_size for entry in entries), MOST_EXPANSION * path.stat().st_size
    if size > limit:
        raise ValueError(
            f"unpacks to {size:,} bytes, more than {MOST_EXPANSION} times its own size"
        )
    return entries


def _check_array(file: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Raises ValueError for an array whose header claims other than the bytes behind it, which
    numpy would allocate.
    """
    # later ones may state a header of 4 GB, which numpy allocates
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{shown(entry.filename)} is not of version 1.0 of npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise ValueError(f"{shown(entry.filename)} does not hold the array that it says")


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # an extra that need not be there
    except ImportError:
        raise InteropError(
            f"{path}: reading it needs PyTorch, which is not installed; run:"
            f" {cli.command('pip', 'install', 'torch')}"
        ) from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _entries(path, archive)
        # tensors and containers; no code of the file's is run
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InteropError(
            f"{path}: cannot be read as a {path.suffix} file of nothing but tensors; save the"
            " model's state_dict()"
        ) from None
    if not isinstance(state, dict):
        raise InteropError(
            f"{path}: holds a {type(state).__name__}, expected a dict of tensors by name (a model's"
            " state_dict)"
        )
    others = [
        f"{shown(name) if isinstance(name, str | int | float) else type(name).__name__} is of type"
        f" {type(value).__name__}"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise InteropError(
            f"{path}: expected a dict of nothing but tensors (a model's state_dict), but"
            f" {', '.join(others[:5])}{', …' * (len(others) > 5)}; save that part of it alone"
        )
    if (
        size := sum(tensor.numel() for tensor in state.values())
    ) > MOST_EXPANSION * path.stat().st_size:
        raise InteropError(
            f"{path}: claims {size:,} numbers, many times what it holds; save the model's"
            " state_dict() itself"
        )
    # numpy has no bfloat16 of PyTorch's; float32 holds it exactly
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        for name, tensor in state.items()
    }


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": lambda path: safetensors.numpy.load_file(path),
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
}


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .npz, or (with PyTorch) .pt, .pth or .bin file, by name. Runs
    no code of the file's.

    Raises `InteropError` for any other file, and for a damaged one.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise InteropError(
            f"{path}: expected a file named {', '.join(f'*{suffix}' for suffix in _READERS)}"
        )
    untrusted.plain_size(path, InteropError)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InteropError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return reader(path)
    except InteropError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds for bytes they cannot make out
        reason = next(iter(str(error).strip().splitlines()), "it ends too early")
        raise InteropError(
            f"{path}: cannot be read as a {path.suffix} file: {type(error).__name__}: {reason}"
        ) from None
