"""Files of tensors by name, as PyTorch's users keep them. The readers run no code of the file."""

import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy

from sngpt_jax.base import cli, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.memory import host_memory
from sngpt_jax.base.memory import shown as shown_size
from sngpt_jax.base.untrusted import shown

MOST_EXPANSION = 64  # an archive may unpack to this many times its own size
REMEDY = "save the model's state_dict() alone"


class InteropError(UserError):
    """A checkpoint that cannot be read or does not fit the model. It names each wrong tensor."""


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):  # np.load would read it as a pickle or as one .npy array
        raise ValueError("not a zip archive")
    with zipfile.ZipFile(path) as archive:
        _check_expansion(path, archive)
        for entry in archive.infolist():
            with archive.open(entry) as file:
                _check_array(file, entry)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _check_expansion(path: Path, archive: zipfile.ZipFile) -> None:
    size = sum(entry.file_size for entry in archive.infolist())
    if size > MOST_EXPANSION * path.stat().st_size:
        raise ValueError(f"unpacks to {size:,} bytes, more than {MOST_EXPANSION} times its size")


def _check_array(file: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Raises ValueError unless the array's header, which numpy trusts for its allocation, matches
    the bytes behind it.
    """
    # the header of a later version may state 4 GB for itself, which numpy allocates
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{shown(entry.filename)} is not of version 1.0 of npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if not dtype.hasobject and file.tell() + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise ValueError(f"{shown(entry.filename)} does not hold the array that its header states")


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # an optional dependency
    except ImportError:
        install = cli.command("pip", "install", "torch")
        raise InteropError(
            f"reading it needs PyTorch, which is not installed; run: {install}"
        ) from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _check_expansion(path, archive)
    try:  # weights_only: tensors and containers, without code
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        problem = f"cannot be read as a {path.suffix} file of tensors alone"
        raise InteropError(f"{problem}; {REMEDY}") from None
    if not isinstance(state, dict):
        problem = f"holds a {type(state).__name__}, expected a dict of tensors by name"
        raise InteropError(f"{problem}; {REMEDY}")
    others = [
        f"{shown(name) if isinstance(name, str | int | float) else type(name).__name__} is of type"
        f" {type(value).__name__}"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        problem = f"expected tensors alone, but {', '.join(others[:5])}{', …' * (len(others) > 5)}"
        raise InteropError(f"{problem}; {REMEDY}")
    size = sum(tensor.numel() for tensor in state.values())
    if size > MOST_EXPANSION * path.stat().st_size:  # views that repeat a few stored numbers
        problem = f"states {size:,} numbers, many times its own size"
        raise InteropError(f"{problem}; {REMEDY}")
    # numpy cannot hold PyTorch's bfloat16; float32 holds it exactly
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        for name, tensor in state.items()
    }


_READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": safetensors.numpy.load_file,
    ".npz": _read_npz,
    **dict.fromkeys((".pt", ".pth", ".bin"), _read_torch),
}


def without_wrappers(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors by their names in the model: without the part `_orig_mod` that torch.compile puts
    in, and the `module` in front that data parallelism puts before all of them.
    """
    names = {name: [part for part in name.split(".") if part != "_orig_mod"] for name in state}
    while names and all(parts[:1] == ["module"] and parts[1:] for parts in names.values()):
        names = {name: parts[1:] for name, parts in names.items()}
    found = {".".join(parts): state[name] for name, parts in names.items()}
    return found if len(found) == len(state) else state


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors, .npz, .pt, .pth or .bin file by name, `without_wrappers`. The
    last three need PyTorch. Raises `InteropError` for any other file and for a damaged one.
    """
    if not (reader := _READERS.get(path.suffix)):
        raise InteropError(f"{path}: expected a file named *{', *'.join(_READERS)}")
    size = untrusted.plain_size(path, InteropError)
    with path.open("rb"):  # an error of the system passes here, before the libraries' errors
        pass
    if size > (left := host_memory()):
        raise InteropError(
            f"{path}: {shown_size(size)}, and the machine has {shown_size(left)} of memory left;"
            " read it on a larger machine"
        )
    try:
        return without_wrappers(reader(path))
    except MemoryError:
        raise MemoryError(f"{path} has {shown_size(size)}") from None
    except InteropError as error:
        raise InteropError(f"{path}: {error}") from None
    except Exception as error:  # the libraries raise a dozen types for damaged bytes
        reason = next(iter(str(error).strip().splitlines()), "it ends too early")
        kind = f"{path.suffix} file: {type(error).__name__}"
        raise InteropError(f"{path}: cannot be read as a {kind}: {reason}") from None
