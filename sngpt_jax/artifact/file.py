"""An exported model as one file, and back: every byte is checked before it is believed.

    8 bytes    magic, with a byte above 127 and both line ends, so that a transfer as text is seen
    uint32     version
    uint32     length of the header
    uint64     length of the payload
    header     JSON in one zstd frame: the metadata, and the table of what the payload holds (`header.py`)
    payload    streams end to end: codes of each tensor with a grid, in the table's order; all scales; all float16; all float32
    32 bytes   SHA-256 of everything before

Numbers are little-endian. Floats are split into planes (`codecs.split_planes`).
"""

import hashlib
import itertools
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from sngpt_jax.artifact import codecs, packing
from sngpt_jax.artifact.header import (
    ArtifactError,
    Codes,
    Floats,
    Grid,
    Storage,
    Table,
    Tensor,
    as_json,
    explained,
    parse,
)
from sngpt_jax.artifact.quantize import Quantized, Stored
from sngpt_jax.base import untrusted

MAGIC = b"\x89SNG\r\n\x1a\n"
VERSION = 1
# bytes that decoding may take, or times the file's size where that is more
MEMORY_LIMIT, MEMORY_RATIO = 8 * 2**30, 48
FILE_LIMIT = 2**40
HEADER_LIMIT = 4 * 2**20  # bytes of JSON; a hundred tensors take about 15,000

HEAD = struct.Struct("<8sIIQ")
DIGEST = 32
# What decoding takes at most: 3 bytes for each byte of the file, as it is copied to aligned words
# and into the coder; 64 for each byte of JSON, which objects of little, and tensors of one number,
# come near; for each code itself, its float32 weight and 8 while a stream is decoded; for each
# float itself, its float32 weight and two copies while planes are joined.
FILE_COST, JSON_COST, CODE_COST, FLOAT_COST = 3, 64, 13, 16

T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """An artifact's bytes and what they go to."""

    data: bytes
    header_bytes: int  # all that is no payload
    # a tensor's codes, and its share of the scales' or floats' stream; all: the payload
    tensor_bytes: dict[str, int]


@dataclass(frozen=True)
class Artifact:
    """What an artifact holds."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    storage: Storage
    header_bytes: int
    tensor_bytes: dict[str, int]


# ---------------------------------------------------------------------------------------------- encode


def encode(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    storage: Storage,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """The artifact of these tensors, in this order, and of `metadata`, a JSON object; the same
    bytes for any `threads`.

    Raises `ArtifactError` for numbers that are not finite, codes that leave their grid, and for
    what `decode` would not take.
    """
    draft = _table_of(tensors, storage, [0] * (len(tensors) + 3))
    with explained("metadata"):
        draft_json = as_json(metadata, draft)
    parse(draft_json, None)
    jobs = [(codes.size, partial(_encode_codes, codes, tensors, storage)) for codes in draft.codes]
    jobs += [
        (floats.size, partial(_encode_floats, floats, tensors, storage)) for floats in draft.floats
    ]
    streams = _in_threads(jobs, threads, progress)
    table = _table_of(tensors, storage, [len(stream) for stream in streams])
    raw = as_json(metadata, table)
    if len(raw) > HEADER_LIMIT:
        raise ArtifactError(
            f"the header takes {len(raw):,} bytes of JSON, above the limit of {HEADER_LIMIT:,}"
        )
    header = codecs.compress(raw, "zstd", 22)
    payload = sum(table.lengths)
    data = b"".join([HEAD.pack(MAGIC, VERSION, len(header), payload), header, *streams])
    data += hashlib.sha256(data).digest()
    _check_memory(
        FILE_COST * len(data) + JSON_COST * len(raw) + _decoding_cost(table),
        default_limit(len(data)),
    )
    return Encoded(data, len(data) - payload, _tensor_bytes(table))


def _table_of(tensors: Mapping[str, Stored], storage: Storage, lengths: Sequence[int]) -> Table:
    rest = iter(lengths)
    entries = []
    for name, x in tensors.items():
        if isinstance(x, Quantized):
            entries.append(
                Tensor(name, x.shape, "grid", Grid(x.bits, x.q_min, x.transposed, next(rest)))
            )
        else:
            # `parse` refuses other types
            entries.append(Tensor(name, x.shape, cast(Any, x.dtype.name), None))
    return Table(storage, tuple(entries), next(rest), next(rest), next(rest))


def _encode_codes(stream: Codes, tensors: Mapping[str, Stored], storage: Storage) -> bytes:
    codes = cast(Quantized, tensors[stream.name]).codes
    bits, q_min = stream.grid.bits, stream.grid.q_min
    with explained(stream.name):
        _check_range(codes, stream.grid)
    if storage.codec == "rans":
        return codecs.encode_codes(codes, bits, q_min)
    flat = np.ascontiguousarray(codes).reshape(-1)
    raw = packing.pack(flat, bits, q_min) if _is_packed(storage, bits) else flat.tobytes()
    return codecs.compress(raw, storage.codec, storage.level)


def _encode_floats(stream: Floats, tensors: Mapping[str, Stored], storage: Storage) -> bytes:
    if not stream.parts:
        return b""
    arrays = []
    for name in stream.parts:
        tensor = tensors[name]
        arrays.append(tensor.scales if isinstance(tensor, Quantized) else tensor)
        if not np.isfinite(arrays[-1]).all():
            raise ArtifactError(f"{name}: holds numbers that are not finite")
    joined = np.concatenate([array.reshape(-1) for array in arrays])
    return codecs.compress(codecs.split_planes(joined), storage.byte_codec, storage.level)


# ---------------------------------------------------------------------------------------------- decode


def read(path: Path, memory_limit: int | None = None) -> Artifact:
    """The artifact in the file `path`; raises `ArtifactError`, one line that begins with the path."""
    data = untrusted.read_bytes(
        path, FILE_LIMIT if memory_limit is None else memory_limit, ArtifactError
    )
    try:
        return decode(data, memory_limit)
    except ArtifactError as problem:
        raise ArtifactError(f"{path}: {problem}") from None


def decode(data: bytes, memory_limit: int | None = None, threads: int | None = None) -> Artifact:
    """What `encode` made `data` of, without using more than about `memory_limit` bytes, `data` and
    float32 weights included.

    No `memory_limit`: `default_limit`. Raises `ArtifactError` for anything else than a whole
    artifact of this version that fits the limit.
    """
    memory_limit = default_limit(len(data)) if memory_limit is None else memory_limit
    header, payload = _open(data)
    with explained("header"):
        size = codecs.zstd_size(header)
        if size > HEADER_LIMIT:
            raise ValueError(f"states {size:,} bytes of JSON, above the limit of {HEADER_LIMIT:,}")
        fixed_cost = FILE_COST * len(data) + JSON_COST * size
        _check_memory(fixed_cost, memory_limit)
        raw = codecs.decompress(header, "zstd", size)
    metadata, table = parse(raw, len(payload))
    _check_memory(fixed_cost + _decoding_cost(table), memory_limit)

    ends = list(itertools.accumulate(table.lengths))
    streams = [payload[end - length : end] for end, length in zip(ends, table.lengths, strict=True)]
    jobs: list[tuple[int, Callable[[], Any]]] = []
    for codes, stream in zip(table.codes, streams[:-3], strict=True):
        jobs.append((codes.size, partial(_decode_codes, codes, stream, table.storage)))
    for floats, stream in zip(table.floats, streams[-3:], strict=True):
        jobs.append((floats.size, partial(_decode_floats, floats, stream, table.storage)))
    *of_grids, scales, half, single = _in_threads(jobs, threads)

    decoded = iter(of_grids)
    tensors: dict[str, Stored] = {}
    for tensor in table.tensors:
        if tensor.grid:
            x = tensor.grid
            tensors[tensor.name] = Quantized(
                next(decoded), scales[tensor.name], x.bits, x.q_min, x.transposed
            )
        else:
            tensors[tensor.name] = (half if tensor.kind == "float16" else single)[tensor.name]
    return Artifact(
        metadata, tensors, table.storage, len(data) - len(payload), _tensor_bytes(table)
    )


def default_limit(size: int) -> int:
    """Bytes that decoding a file of `size` bytes may take: 8 GiB, more for a large file, which
    3-bit weights fill up.
    """
    return max(MEMORY_LIMIT, MEMORY_RATIO * size)


def _open(data: bytes) -> tuple[memoryview, memoryview]:
    """The header, compressed, and the payload, once magic, version, lengths and checksum are
    right.
    """
    if not data.startswith(MAGIC):
        raise ArtifactError(
            f"is no artifact: begins with {data[: len(MAGIC)]!r}, expected {MAGIC!r}"
        )
    if len(data) < HEAD.size + DIGEST:
        raise ArtifactError(
            f"is truncated: {len(data)} bytes, an artifact has at least {HEAD.size + DIGEST}"
        )
    _, version, header, payload = HEAD.unpack_from(data)
    if version != VERSION:
        raise ArtifactError(
            f"is an artifact of version {version}; this program reads version {VERSION}"
        )
    expected = HEAD.size + header + payload + DIGEST
    if len(data) != expected:
        what = "is truncated" if len(data) < expected else "goes on after its end"
        raise ArtifactError(f"{what}: {len(data):,} bytes, expected {expected:,}")
    view = memoryview(data)
    if hashlib.sha256(view[:-DIGEST]).digest() != data[-DIGEST:]:
        raise ArtifactError(
            "is damaged: its checksum (SHA-256) does not fit its bytes; copy it again"
        )
    return view[HEAD.size : HEAD.size + header], view[HEAD.size + header : -DIGEST]


def _decoding_cost(table: Table) -> int:
    return CODE_COST * sum(codes.size for codes in table.codes) + FLOAT_COST * sum(
        floats.size for floats in table.floats
    )


def _check_memory(cost: int, limit: int) -> None:
    if cost > limit:
        raise ArtifactError(
            f"needs {cost:,} bytes of memory to decode, above the limit of {limit:,}"
        )


def _decode_codes(codes: Codes, stream: memoryview, storage: Storage) -> np.ndarray:
    """int8 [rows, columns]."""
    bits, q_min = codes.grid.bits, codes.grid.q_min
    with explained(codes.name):
        if storage.codec == "rans":
            return codecs.decode_codes(stream, codes.rows, codes.columns, bits, q_min)
        if _is_packed(storage, bits):
            raw = codecs.decompress(stream, storage.codec, packing.packed_size(codes.size, bits))
            flat = packing.unpack(raw, codes.size, bits, q_min)
        else:
            flat = np.frombuffer(codecs.decompress(stream, storage.codec, codes.size), np.int8)
            _check_range(flat, codes.grid)
        return flat.reshape(codes.rows, codes.columns)


def _decode_floats(floats: Floats, stream: memoryview, storage: Storage) -> dict[str, np.ndarray]:
    """Each part, by its tensor's name."""
    if not floats.parts:
        return {}
    with explained(floats.what):
        raw = codecs.decompress(stream, storage.byte_codec, floats.size * floats.dtype.itemsize)
        joined = codecs.join_planes(raw, floats.dtype)
        if not np.isfinite(joined).all():
            raise ValueError("hold numbers that are not finite")
    ends = itertools.accumulate(math.prod(shape) for shape in floats.parts.values())
    return {
        name: joined[end - math.prod(shape) : end].reshape(shape).copy()
        for (name, shape), end in zip(floats.parts.items(), ends, strict=True)
    }


# ---------------------------------------------------------------------------------------------- both


def _is_packed(storage: Storage, bits: int) -> bool:
    return storage.packed and bits < 8


def _check_range(codes: np.ndarray, grid: Grid) -> None:
    if codes.min() < grid.q_min or codes.max() > grid.q_max:
        raise ValueError(
            f"codes from {codes.min()} to {codes.max()}, expected {grid.q_min} to {grid.q_max}"
        )


def _tensor_bytes(table: Table) -> dict[str, int]:
    """Bytes of the payload by tensor. A stream that several share is dealt out by their sizes, in
    whole bytes.
    """
    found = {tensor.name: tensor.grid.length if tensor.grid else 0 for tensor in table.tensors}
    for floats in table.floats:
        whole, end = floats.size, 0
        for name, shape in floats.parts.items():
            start, end = end, end + math.prod(shape)
            found[name] += floats.length * end // whole - floats.length * start // whole
    return found


def _in_threads(
    jobs: Sequence[tuple[int, Callable[[], T]]],
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """The results of jobs (size, call), in their order; the largest begin first. The first error
    to come up is raised.
    """
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i][0])
        futures = {pool.submit(jobs[i][1]): i for i in order}
        results: dict[int, T] = {}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                if progress:
                    progress(len(results), len(jobs))
            return [results[i] for i in range(len(jobs))]
        finally:
            pool.shutdown(cancel_futures=True)
