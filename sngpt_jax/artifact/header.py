"""The header of an artifact: its metadata, and the table of the payload's contents, fully checked.

The header is JSON exactly as `as_json` writes it, so each content has one spelling.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from sngpt_jax.artifact.codecs import ByteCodec
from sngpt_jax.artifact.policy import largest_code
from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError

MAX_AXES = 16
MAX_AXIS = 2**40  # keeps products of axes short enough for a message
NAME = re.compile(r"\w[\w.-]{0,99}(/\w[\w.-]{0,99}){0,15}", re.ASCII)
LEVELS = {"rans": (1, 22), "zstd": (1, 22), "lzma": (0, 9)}


class ArtifactError(UserError):
    """A file that is no artifact, is damaged, or needs too much memory. A line that quotes the file
    ends after 500 characters.
    """

    def __init__(self, line: str):
        super().__init__(line if len(line) <= 500 else f"{line[:500]} …")


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns a ValueError into an `ArtifactError` that names `where`."""
    try:
        yield
    except ValueError as problem:
        raise ArtifactError(f"{where}: {problem}") from None


@dataclass(frozen=True)
class Storage:
    """How codes become bytes."""

    packed: bool  # join codes of fewer than 8 bits bit by bit (`packing`); excludes rans
    codec: Literal["rans", "zstd", "lzma"]  # of the codes; beside rans, zstd compresses the floats
    level: int  # of zstd, 1 to 22, or lzma, 0 to 9

    @property
    def byte_codec(self) -> ByteCodec:
        return "lzma" if self.codec == "lzma" else "zstd"


@dataclass(frozen=True)
class Grid:
    """The grid of a tensor's codes, and the size of their stream."""

    bits: int
    q_min: int
    transposed: bool
    length: int  # bytes of the stream of codes; 0: the codes go on an earlier tensor's stream


@dataclass(frozen=True)
class Tensor:
    """A row of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["grid", "float16", "float32"]
    grid: Grid | None  # None unless `kind` is grid

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Rows and columns of the codes. Rows of a transposed matrix lie along its last axis."""
        return self.shape[::-1] if self.grid and self.grid.transposed else self.shape


class Stream(NamedTuple):
    """A stream of the payload: codes of a tensor, all packed codes of a grid, all scales, or all
    tensors of a float type.
    """

    what: str  # its name in messages
    length: int  # in bytes; 0 without parts
    dtype: np.dtype
    parts: dict[str, tuple[int, ...]]  # the shapes of its arrays by tensor, in the table's order
    grid: Grid | None = None  # of codes

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.parts.values()))


@dataclass(frozen=True)
class Table:
    """The contents of the payload."""

    storage: Storage
    tensors: tuple[Tensor, ...]
    scales: int  # bytes of each of the three streams after the codes; 0 for an empty stream
    float16: int
    float32: int

    @property
    def streams(self) -> list[Stream]:
        """The streams in file order."""
        codes: list[Stream] = []
        scales, shared = {}, {}
        floats: dict[str, dict[str, tuple[int, ...]]] = {"float16": {}, "float32": {}}
        for x in self.tensors:
            if x.grid:
                parts, alike = {x.name: x.code_shape}, (x.grid.bits, x.grid.q_min)
                if x.grid.length or alike not in shared:
                    shared[alike] = parts
                    codes.append(Stream(x.name, x.grid.length, np.dtype(np.int8), parts, x.grid))
                else:
                    shared[alike] |= parts
                scales[x.name] = x.code_shape[:1]
            else:
                floats[x.kind][x.name] = x.shape
        half, single = np.dtype(np.float16), np.dtype(np.float32)
        return [
            *codes,
            Stream("scales", self.scales, half, scales),
            Stream("float16 tensors", self.float16, half, floats["float16"]),
            Stream("float32 tensors", self.float32, single, floats["float32"]),
        ]


@dataclass(frozen=True)
class Header:
    """The parts of a header."""

    metadata: dict[str, Any]
    table: Table


def as_json(value: Any) -> bytes:
    """The one spelling of `value`. Raises ValueError for a number that is not finite."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse(raw: bytes, payload: int | None) -> Header:
    """The checked header. Its streams must fill `payload` bytes, unless that is None. Raises
    `ArtifactError`.
    """
    with explained("header"):
        values = typed_json.loads(raw)
        if as_json(values) != raw:
            raise ValueError("JSON in another spelling than this program writes")
    header = typed_json.parse(Header, values, "header", ArtifactError)
    storage, names = header.table.storage, set()
    lowest, highest = LEVELS[storage.codec]
    with explained("header.table"):
        if not lowest <= storage.level <= highest:
            levels = f"expected {lowest} to {highest}"
            raise ValueError(f"level {storage.level} of {storage.codec}, {levels}")
        if storage.packed and storage.codec == "rans":
            raise ValueError("the codec rans takes no packed codes")
        for tensor in header.table.tensors:
            name, grid = tensor.name, tensor.grid
            if grid and not grid.length and not (storage.packed and grid.bits < 8):
                raise ValueError(f"{name!r} has no stream, and only packed codes share one")
            if not NAME.fullmatch(name):
                raise ValueError(f"not a tensor's name: {name!r}")
            if name in names:
                raise ValueError(f"{name!r} names two tensors")
            names.add(name)
            with explained(name):
                _check_tensor(tensor)
        streams = header.table.streams
        lengths = [stream.length for stream in streams]
        if payload is not None and (min(lengths) < 0 or sum(lengths) != payload):
            raise ValueError(f"the streams do not fill the payload of {payload:,} bytes")
        for stream in streams:
            if stream.length and not stream.parts:
                raise ValueError(f"{stream.length:,} bytes of {stream.what} without a tensor")
    return header


def _check_tensor(tensor: Tensor) -> None:
    shape, grid = tensor.shape, tensor.grid
    if len(shape) > MAX_AXES or not all(1 <= axis <= MAX_AXIS for axis in shape):
        raise ValueError(f"expected at most {MAX_AXES} axes, each 1 to 2^40 long, found {shape}")
    if (grid is None) == (tensor.kind == "grid"):
        raise ValueError(f"kind {tensor.kind} {'without' if grid is None else 'with'} a grid")
    if grid is None:
        return
    if len(shape) != 2 or not 2 <= grid.bits <= 8:
        found = f"found {len(shape)} and {grid.bits}"
        raise ValueError(f"a grid needs 2 axes and 2 to 8 bits, {found}")
    least = -largest_code(grid.bits)
    if grid.q_min not in (least, least - 1):
        expected = f"expected {least} or {least - 1} as the least code of {grid.bits} bits"
        raise ValueError(f"{expected}, found {grid.q_min}")
