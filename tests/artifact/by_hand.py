"""Artifacts taken apart and put together without the package, for the tests of its reader."""

import hashlib
import json
import struct

import numpy as np
import zstandard

from sngpt_jax.artifact.quantize import Quantized
from sngpt_jax.artifact.sngpt_file import Storage

MAGIC = b"\x89SNG\r\n\x1a\n"
STORAGES = [
    Storage(packed=False, codec="rans", level=22),
    Storage(packed=False, codec="zstd", level=22),
    Storage(packed=True, codec="zstd", level=3),
    Storage(packed=False, codec="lzma", level=9),
    Storage(packed=True, codec="lzma", level=1),
]


def quantized(rows, columns, bits, full=False, transposed=True, seed=0, spread=0.0):
    """A tensor of Gaussian rows whose deviations differ by a factor exp(spread · normal)."""
    rng = np.random.default_rng(seed)
    q_max = 2 ** (bits - 1) - 1
    q_min = -q_max - 1 if full else -q_max
    deviations = q_max / 3 * np.exp(spread * rng.standard_normal((rows, 1)))
    codes = np.round(rng.standard_normal((rows, columns)) * deviations)
    scales = rng.uniform(0.001, 0.1, rows).astype(np.float16)
    return Quantized(np.clip(codes, q_min, q_max).astype(np.int8), scales, bits, q_min, transposed)


def split(data):
    """The header's JSON text, and the payload."""
    length = struct.unpack_from("<I", data, 12)[0]
    return zstandard.ZstdDecompressor().decompress(data[24 : 24 + length]), data[24 + length : -32]


def sealed(body):
    """`body` with its checksum."""
    return body + hashlib.sha256(body).digest()


def assemble(header, payload, **frame):
    """The artifact of a header, as JSON text or as a zstd frame, and a payload."""
    if not header.startswith(b"\x28\xb5\x2f\xfd"):
        header = zstandard.ZstdCompressor(**{"level": 1, **frame}).compress(header)
    lengths = struct.pack("<IIQ", 1, len(header), len(payload))
    return sealed(MAGIC + lengths + header + payload)


def as_text(header):
    """The JSON text of a header."""
    return json.dumps(header, separators=(",", ":")).encode()
