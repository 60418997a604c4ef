"""An exported model as one file. The reader checks every byte before it uses it.

    8 bytes    magic, with a byte above 127 and both line ends, so that a transfer as text shows
    uint32     version
    uint32     length of the header
    uint64     length of the payload
    header     JSON in one zstd frame: the metadata, and the table of the payload (`header.py`)
    payload    streams end to end: codes of each tensor with a grid in the table's order, all
               scales, all float16 tensors, all float32 tensors. Packed codes of one grid share the
               stream of their first tensor, which LZMA makes 6 % smaller than a stream per tensor.
    32 bytes   SHA-256 of everything before

Numbers are little-endian. Floats are split into byte planes (`codecs.split_planes`).
"""

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from sngpt_jax.artifact import codecs, packing
from sngpt_jax.artifact.header import (
    ArtifactError,
    Grid,
    Header,
    Storage,
    Stream,
    Table,
    Tensor,
    as_json,
    explained,
    parse,
)
from sngpt_jax.artifact.parallel import Progress, in_threads
from sngpt_jax.artifact.policy import largest_code
from sngpt_jax.artifact.quantize import Quantized, Stored
from sngpt_jax.base import untrusted
from sngpt_jax.base.memory import host_memory, shown

MAGIC = b"\x89SNG\r\n\x1a\n"
VERSION = 2
READABLE = (1, 2)  # version 1 has a stream per tensor always
# decoding may take this many bytes, or this many times the file's size if that is more
MEMORY_LIMIT, MEMORY_RATIO = 8 * 2**30, 48
FILE_LIMIT = 2**40
HEADER_LIMIT = 4 * 2**20  # bytes of JSON; a hundred tensors take about 15,000

HEAD = struct.Struct("<8sIIQ")
DIGEST = 32
# Upper bounds of the bytes that decoding takes. A byte of the file takes itself, its copy in words,
# and the coder's copy. Small objects and tensors of one number almost take 64 bytes per byte of
# JSON. A code takes itself, its float32 weight, and 8 while a stream is decoded. A float takes
# itself, its float32 weight, and two copies while planes join.
FILE_COST, JSON_COST, CODE_COST, FLOAT_COST = 3, 64, 13, 16


@dataclass(frozen=True)
class Encoded:
    """An artifact's bytes, and their account."""

    data: bytes
    header_bytes: int  # everything except the payload
    tensor_bytes: dict[str, int]  # the payload's, with shares of the streams of floats
    levels: dict[int, int]  # streams by the level of zstd or lzma that made them smallest


@dataclass(frozen=True)
class Artifact:
    """The contents of an artifact."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    storage: Storage


def encode(
    metadata: dict[str, Any],
    tensors: Mapping[str, Stored],
    storage: Storage,
    progress: Progress | None = None,
) -> Encoded:
    """The artifact of `tensors`, in their order, and of `metadata`, a JSON object. The bytes do not
    depend on the number of processors. Raises `ArtifactError` for all that `decode` would refuse.
    """
    draft = _table_of(tensors, storage)
    with explained("metadata"):
        parse(as_json(asdict(Header(metadata, draft))), None)
    jobs = [(stream.size, partial(_encode, stream, tensors, storage)) for stream in draft.streams]
    done = in_threads(jobs, progress=progress)
    streams = [stream for stream, _ in done]
    levels = Counter(level for _, level in done if level)
    table = _table_of(tensors, storage, [len(stream) for stream in streams])
    raw = as_json(asdict(Header(metadata, table)))
    header = codecs.compress(raw, "zstd", 22)
    payload = sum(map(len, streams))
    data = b"".join([HEAD.pack(MAGIC, VERSION, len(header), payload), header, *streams])
    data += hashlib.sha256(data).digest()
    _check_size(len(data), len(raw), default_limit(len(data)), table)
    return Encoded(data, len(data) - payload, _tensor_bytes(table), dict(sorted(levels.items())))


def _table_of(
    tensors: Mapping[str, Stored], storage: Storage, lengths: Sequence[int] = ()
) -> Table:
    """The table for streams of these lengths; without them each stream of codes has length 1."""
    rest = iter(lengths)
    entries, shared = [], set()
    for name, x in tensors.items():
        if isinstance(x, Quantized):
            alike = (x.bits, x.q_min)
            grid = Grid(*alike, x.transposed, 0 if alike in shared else next(rest, 1))
            entries.append(Tensor(name, x.shape, "grid", grid))
            if storage.packed and x.bits < 8:
                shared.add(alike)
        else:  # `parse` refuses other types than float16 and float32
            entries.append(Tensor(name, x.shape, cast(Any, x.dtype.name), None))
    return Table(storage, tuple(entries), next(rest, 0), next(rest, 0), next(rest, 0))


def _encode(
    stream: Stream, tensors: Mapping[str, Stored], storage: Storage
) -> tuple[bytes, int | None]:
    """The stream's bytes, and the level of zstd or lzma behind them."""
    grid, arrays = stream.grid, []
    for name in stream.parts:
        x = tensors[name]
        arrays.append(x if not isinstance(x, Quantized) else x.codes if grid else x.scales)
        with explained(name):
            _check(arrays[-1], grid)
    if not arrays:
        return b"", None
    if grid and storage.codec == "rans":
        return codecs.encode_codes(arrays[0], grid.bits, grid.q_min), None
    joined = np.concatenate([array.reshape(-1) for array in arrays])
    if grid and storage.packed and grid.bits < 8:
        raw = packing.pack(joined, grid.bits, grid.q_min)
    else:
        raw = codecs.split_planes(joined)
    # On bytes without repeats zstd's level 1 is often the best, and it takes milliseconds.
    levels = {storage.level, 1} if storage.byte_codec == "zstd" else {storage.level}
    tried = [(codecs.compress(raw, storage.byte_codec, level), level) for level in sorted(levels)]
    return min(tried, key=lambda found: len(found[0]))


def read(path: Path) -> Artifact:
    """The artifact in the file `path`. Raises `ArtifactError` that names the path."""
    head, size = untrusted.read_start(path, HEAD.size, ArtifactError)
    try:
        _check_head(head, size)  # before anything else is read
        if (need := FILE_COST * size) > (left := host_memory()):
            has = f"the machine has {shown(left)} left"
            raise ArtifactError(f"needs {shown(need)} of memory to read, and {has}")
        return decode(untrusted.read_bytes(path, FILE_LIMIT, ArtifactError))
    except ArtifactError as problem:
        raise ArtifactError(f"{path}: {problem}") from None


def decode(data: bytes, memory_limit: int | None = None) -> Artifact:
    """The contents of the artifact `data`. Raises `ArtifactError` for anything else, and where
    decoding, with `data` and float32 weights, takes more than `memory_limit` bytes; None stands for
    `default_limit`.
    """
    limit = default_limit(len(data)) if memory_limit is None else memory_limit
    frame, payload = _open(data)
    with explained("header"):
        size = codecs.zstd_size(frame)
    _check_size(len(data), size, limit)
    with explained("header"):
        raw = codecs.decompress(frame, "zstd", size)
    header = parse(raw, len(payload))
    table = header.table
    _check_size(len(data), size, limit, table)
    ends = accumulate((stream.length for stream in table.streams), initial=0)
    jobs = [
        (stream.size, partial(_decode, stream, payload[start:end], table.storage))
        for stream, (start, end) in zip(table.streams, pairwise(ends), strict=True)
    ]
    *codes, scales, half, single = in_threads(jobs)
    arrays = {name: array for part in (*codes, half, single) for name, array in part.items()}
    tensors: dict[str, Stored] = {
        x.name: Quantized(arrays[x.name], scales[x.name], grid.bits, grid.q_min, grid.transposed)
        if (grid := x.grid)
        else arrays[x.name]
        for x in table.tensors
    }
    return Artifact(header.metadata, tensors, table.storage)


def default_limit(size: int) -> int:
    """The bytes that decoding a file of `size` bytes may take."""
    return max(MEMORY_LIMIT, MEMORY_RATIO * size)


def _check_head(head: bytes, size: int) -> int:
    """The length of the header, by the `head` of a file of `size` bytes, whose magic, version and
    lengths are right.
    """
    if not head.startswith(MAGIC):
        raise ArtifactError(f"not an artifact: begins with {head[: len(MAGIC)]!r}")
    least = HEAD.size + DIGEST
    if size < least:
        raise ArtifactError(f"truncated: {size} bytes, an artifact has at least {least}")
    _, version, header, payload = HEAD.unpack_from(head)
    if version not in READABLE:
        raise ArtifactError(f"an artifact of version {version}, expected version 1 or 2")
    expected = least + header + payload
    if size != expected:
        what = "truncated" if size < expected else "continues after its end"
        raise ArtifactError(f"{what}: {size:,} bytes, expected {expected:,}")
    return int(header)


def _open(data: bytes) -> tuple[memoryview, memoryview]:
    """The compressed header and the payload, after magic, version, lengths and checksum."""
    header = _check_head(data, len(data))
    if hashlib.sha256(memoryview(data)[:-DIGEST]).digest() != data[-DIGEST:]:
        raise ArtifactError("damaged: its SHA-256 does not match its bytes; copy the file again")
    body = memoryview(data)[HEAD.size : -DIGEST]
    return body[:header], body[header:]


def _decode(stream: Stream, data: memoryview, storage: Storage) -> dict[str, np.ndarray]:
    """The stream's arrays by tensor."""
    if not stream.parts:
        return {}
    grid, size = stream.grid, stream.size
    with explained(stream.what):
        if grid and storage.codec == "rans":
            ((rows, columns),) = stream.parts.values()
            joined = codecs.decode_codes(data, rows, columns, grid.bits, grid.q_min).reshape(-1)
        elif grid and storage.packed and grid.bits < 8:
            raw = codecs.decompress(data, storage.byte_codec, packing.packed_size(size, grid.bits))
            joined = packing.unpack(raw, size, grid.bits, grid.q_min)
        else:
            raw = codecs.decompress(data, storage.byte_codec, size * stream.dtype.itemsize)
            joined = codecs.join_planes(raw, stream.dtype)
        _check(joined, grid)
    ends = accumulate(map(math.prod, stream.parts.values()))
    pieces = np.split(joined, list(ends)[:-1])
    parts = zip(stream.parts.items(), pieces, strict=True)
    return {name: piece.reshape(shape) for (name, shape), piece in parts}


def _check_size(file: int, json: int, limit: int, table: Table | None = None) -> None:
    """Refuses a file of `file` bytes, `json` bytes of JSON and the streams of `table`, if decoding
    takes more than `limit` bytes.
    """
    if json > HEADER_LIMIT:
        raise ArtifactError(f"header: {json:,} bytes of JSON, above the limit of {HEADER_LIMIT:,}")
    cost = FILE_COST * file + JSON_COST * json
    for stream in table.streams if table else ():
        cost += stream.size * (CODE_COST if stream.grid else FLOAT_COST)
    if cost > limit:
        raise ArtifactError(f"needs {cost:,} bytes to decode, above the limit of {limit:,}")


def _check(values: np.ndarray, grid: Grid | None) -> None:
    """Raises ValueError for codes outside their grid, and for floats that are not finite."""
    if grid is None:
        if not np.isfinite(values).all():
            raise ValueError("numbers that are not finite")
        return
    low, high, q_max = values.min(), values.max(), largest_code(grid.bits)
    if low < grid.q_min or high > q_max:
        raise ValueError(f"codes from {low} to {high}, expected {grid.q_min} to {q_max}")


def _tensor_bytes(table: Table) -> dict[str, int]:
    """The payload's bytes by tensor. Tensors share a stream by their sizes, in whole bytes."""
    found = dict.fromkeys((tensor.name for tensor in table.tensors), 0)
    for stream in table.streams:
        whole, end = stream.size, 0
        for name, shape in stream.parts.items():
            start, end = end, end + math.prod(shape)
            found[name] += stream.length * end // whole - stream.length * start // whole
    return found
