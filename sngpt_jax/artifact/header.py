"""The header of an artifact: its metadata, and the table of what its payload holds, checked in
every detail.

It is JSON exactly as `as_json` writes it, so that no two headers say the same and none says
anything twice.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from sngpt_jax.artifact.codecs import ByteCodec
from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError

MAX_AXES = 16
MAX_AXIS = 2**40  # so that products of axes stay numbers that a line can show
NAME = re.compile(r"\w[\w.-]{0,99}(/\w[\w.-]{0,99}){0,15}", re.ASCII)
LEVELS = {"rans": (1, 22), "zstd": (1, 22), "lzma": (0, 9)}


class ArtifactError(UserError):
    """A file that is no artifact, or a damaged or too large one. It quotes what files hold, so it
    is cut at 500 letters.
    """

    def __init__(self, line: str):
        super().__init__(line if len(line) <= 500 else f"{line[:500]} …")


@contextmanager
def explained(where: str) -> Iterator[None]:
    """A ValueError of a library's or of a check becomes one line that says where."""
    try:
        yield
    except ValueError as problem:
        raise ArtifactError(f"{where}: {problem}") from None


@dataclass(frozen=True)
class Storage:
    """How codes become bytes."""

    packed: bool  # codes of fewer than 8 bits bit by bit (`packing`), not a byte each; not for rans
    codec: Literal["rans", "zstd", "lzma"]  # of the codes; with rans, scales and floats go by zstd
    level: int  # of zstd, 1 to 22, or lzma, 0 to 9

    @property
    def byte_codec(self) -> ByteCodec:
        return "lzma" if self.codec == "lzma" else "zstd"


@dataclass(frozen=True)
class Grid:
    """How the codes of a tensor stand on their grid and in the file."""

    bits: int
    q_min: int
    transposed: bool
    length: int  # bytes of the codes' stream

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Tensor:
    """A row of the table of tensors."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["grid", "float16", "float32"]
    grid: Grid | None  # where it is kind


class Codes(NamedTuple):
    """A stream of one tensor's codes."""

    name: str
    grid: Grid
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


class Floats(NamedTuple):
    """A stream of the scales, or of all tensors of one type."""

    what: str
    length: int  # in bytes; 0 where there are no parts
    dtype: np.dtype
    # tensors and the shapes of what is here of them, in their order
    parts: dict[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.parts.values())


@dataclass(frozen=True)
class Table:
    """What the payload holds."""

    storage: Storage
    tensors: tuple[Tensor, ...]
    scales: int  # bytes of the three streams after the codes'; a stream of nothing has none
    float16: int
    float32: int

    @property
    def codes(self) -> list[Codes]:
        """The streams of codes, in their order. A row is an entry of a matrix's last axis where it
        is transposed.
        """
        return [
            Codes(
                tensor.name,
                tensor.grid,
                *(reversed(tensor.shape) if tensor.grid.transposed else tensor.shape),
            )
            for tensor in self.tensors
            if tensor.grid
        ]

    @property
    def floats(self) -> list[Floats]:
        """The streams after them."""
        half, single = (
            {x.name: x.shape for x in self.tensors if x.kind == kind}
            for kind in ("float16", "float32")
        )
        return [
            Floats(
                "scales",
                self.scales,
                np.dtype(np.float16),
                {codes.name: (codes.rows,) for codes in self.codes},
            ),
            Floats("float16 tensors", self.float16, np.dtype(np.float16), half),
            Floats("float32 tensors", self.float32, np.dtype(np.float32), single),
        ]

    @property
    def lengths(self) -> list[int]:
        """Bytes of all streams."""
        return [
            *(codes.grid.length for codes in self.codes),
            self.scales,
            self.float16,
            self.float32,
        ]


def as_json(metadata: Mapping[str, Any], table: Table) -> bytes:
    """The header. Raises ValueError for a number that is not finite."""
    return _canonical({"metadata": metadata, "table": asdict(table)})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def parse(raw: bytes, payload: int | None) -> tuple[dict[str, Any], Table]:
    """Metadata and table of a header, everything in them checked; `payload` bytes are what the
    streams must take.
    """
    with explained("header"):
        header = typed_json.loads(raw)
        if _canonical(header) != raw:
            raise ValueError("is JSON, but not as this program writes it")
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
            raise ValueError("packed codes are not for rans")
        _check_names([tensor.name for tensor in table.tensors])
        for tensor in table.tensors:
            with explained(tensor.name):
                _check_tensor(tensor)
        if payload is not None:
            _check_lengths(table, payload)
    return header["metadata"], table


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"no name of a tensor, words joined by /, of letters, digits and _.-: {name!r}"
            )
    folders = {name[: slash.start()] for name in names for slash in re.finditer("/", name)}
    taken: set[str] = set()
    for name in names:
        if name in taken or name in folders:
            raise ValueError(
                f"two tensors are named {name!r}, or one is named as the folder of another"
            )
        taken.add(name)


def _check_tensor(tensor: Tensor) -> None:
    if len(tensor.shape) > MAX_AXES or not all(1 <= axis <= MAX_AXIS for axis in tensor.shape):
        raise ValueError(
            f"expected at most {MAX_AXES} axes, each 1 to 2^40 long, found {tensor.shape}"
        )
    grid = tensor.grid
    if (grid is None) == (tensor.kind == "grid"):
        raise ValueError(f"kind {tensor.kind} {'without' if grid is None else 'with'} a grid")
    if grid is None:
        return
    if len(tensor.shape) != 2:
        raise ValueError(f"a grid needs 2 axes, found {len(tensor.shape)}")
    if not 2 <= grid.bits <= 8:
        raise ValueError(f"expected 2 to 8 bits, found {grid.bits}")
    if grid.q_min not in (-grid.q_max, -grid.q_max - 1):
        raise ValueError(
            f"expected codes of {grid.bits} bits from {-grid.q_max} or {-grid.q_max - 1} on, found"
            f" {grid.q_min}"
        )


def _check_lengths(table: Table, payload: int) -> None:
    if not all(0 <= length <= payload for length in table.lengths) or sum(table.lengths) != payload:
        raise ValueError(f"the streams do not fill the payload of {payload:,} bytes")
    for floats in table.floats:
        if floats.length and not floats.parts:
            raise ValueError(
                f"{floats.length:,} bytes of {floats.what}, and no tensor that has them"
            )
