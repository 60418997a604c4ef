"""The header of an artifact: its metadata, and the table of the payload's contents, fully checked.

The header is JSON exactly as `as_json` writes it, so each content has one spelling.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
    """A file that is not an artifact, is damaged, or needs too much memory. The line can quote the
    file, so it ends after 500 characters.
    """

    def __init__(self, line: str):
        super().__init__(line if len(line) <= 500 else f"{line[:500]} …")


@contextmanager
def explained(where: str) -> Iterator[None]:
    """Turns a ValueError of a library or a check into an `ArtifactError` that names `where`."""
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

    def packs(self, bits: int) -> bool:
        """Whether codes of `bits` bits are joined bit by bit."""
        return self.packed and bits < 8


@dataclass(frozen=True)
class Grid:
    """The grid of a tensor's codes, and the size of their stream."""

    bits: int
    q_min: int
    transposed: bool
    length: int  # bytes of the stream of codes

    @property
    def q_max(self) -> int:
        return largest_code(self.bits)


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
    """A stream of the payload: one tensor's codes, all scales, or all tensors of a float type."""

    what: str  # its name in messages
    length: int  # in bytes; 0 without parts
    dtype: np.dtype
    parts: dict[str, tuple[int, ...]]  # the shapes of its arrays by tensor, in the table's order
    grid: Grid | None = None  # of codes

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.parts.values())


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
        grids = [(x, x.grid) for x in self.tensors if x.grid]
        half, single = np.dtype(np.float16), np.dtype(np.float32)
        shapes: dict[str, dict[str, tuple[int, ...]]] = {"float16": {}, "float32": {}, "grid": {}}
        for x in self.tensors:
            shapes[x.kind][x.name] = x.shape
        return [
            *(
                Stream(x.name, grid.length, np.dtype(np.int8), {x.name: x.code_shape}, grid)
                for x, grid in grids
            ),
            Stream("scales", self.scales, half, {x.name: x.code_shape[:1] for x, _ in grids}),
            Stream("float16 tensors", self.float16, half, shapes["float16"]),
            Stream("float32 tensors", self.float32, single, shapes["float32"]),
        ]


def as_json(metadata: Mapping[str, Any], table: Table) -> bytes:
    """The header's JSON. Raises ValueError for a number that is not finite."""
    return _canonical({"metadata": metadata, "table": asdict(table)})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse(raw: bytes, payload: int | None) -> tuple[dict[str, Any], Table]:
    """The metadata and the checked table of a header. The streams must fill `payload` bytes, unless
    that is None. Raises `ArtifactError`.
    """
    with explained("header"):
        header = typed_json.loads(raw)
        if _canonical(header) != raw:
            raise ValueError("JSON in another spelling than this program writes")
        if not isinstance(header, dict) or header.keys() != {"metadata", "table"}:
            raise ValueError("expected an object of metadata and table")
        if not isinstance(header["metadata"], dict):
            raise ValueError("metadata: expected an object")
    table = typed_json.parse(Table, header["table"], "header.table", ArtifactError)
    storage = table.storage
    lowest, highest = LEVELS[storage.codec]
    with explained("header.table"):
        if not lowest <= storage.level <= highest:
            raise ValueError(
                f"level {storage.level} of {storage.codec}, expected {lowest} to {highest}"
            )
        if storage.packed and storage.codec == "rans":
            raise ValueError("the codec rans takes no packed codes")
        _check_names(tensor.name for tensor in table.tensors)
        for tensor in table.tensors:
            with explained(tensor.name):
                _check_tensor(tensor)
        if payload is not None:
            _check_lengths(table, payload)
    return header["metadata"], table


def _check_names(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if not NAME.fullmatch(name):
            raise ValueError(f"not a tensor's name (words of letters, digits, _.-, /): {name!r}")
        if count > 1:
            raise ValueError(f"{name!r} names two tensors")


def _check_tensor(tensor: Tensor) -> None:
    shape, grid = tensor.shape, tensor.grid
    if len(shape) > MAX_AXES or not all(1 <= axis <= MAX_AXIS for axis in shape):
        raise ValueError(f"expected at most {MAX_AXES} axes, each 1 to 2^40 long, found {shape}")
    if (grid is None) == (tensor.kind == "grid"):
        raise ValueError(f"kind {tensor.kind} {'without' if grid is None else 'with'} a grid")
    if grid is None:
        return
    if len(shape) != 2:
        raise ValueError(f"a grid needs 2 axes, found {len(shape)}")
    if not 2 <= grid.bits <= 8:
        raise ValueError(f"expected 2 to 8 bits, found {grid.bits}")
    lowest = (-grid.q_max, -grid.q_max - 1)
    if grid.q_min not in lowest:
        raise ValueError(
            f"expected {lowest[0]} or {lowest[1]} as the least code of {grid.bits} bits, found"
            f" {grid.q_min}"
        )


def _check_lengths(table: Table, payload: int) -> None:
    lengths = [stream.length for stream in table.streams]
    if not all(0 <= length <= payload for length in lengths) or sum(lengths) != payload:
        raise ValueError(f"the streams do not fill the payload of {payload:,} bytes")
    for stream in table.streams:
        if stream.length and not stream.parts:
            raise ValueError(f"{stream.length:,} bytes of {stream.what} without a tensor")
