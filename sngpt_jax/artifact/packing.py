"""Codes of fewer than 8 bits joined bit by bit.

The bits are little-endian: code number i, less q_min, takes bits b·i to b·i + b - 1, and byte j
holds bits 8j to 8j + 7. Zeros fill the last group of whole bytes: 8 codes of int5 take 5 bytes.
"""

import math

import numpy as np


def pack(codes: np.ndarray, bits: int, q_min: int) -> bytes:
    """Codes int8 [n], each q_min … q_min + 2^bits - 1, as bytes; bits 1 to 8."""
    values, size = _group(bits)
    groups = np.zeros((-(-codes.size // values), values), np.uint8)
    # modulo 256, which is exact for codes of at most 8 bits
    groups.reshape(-1)[: codes.size] = codes.view(np.uint8) - np.uint8(q_min % 256)
    packed = np.zeros((len(groups), size), np.uint8)
    for i in range(values):
        byte, shift = divmod(bits * i, 8)
        packed[:, byte] |= groups[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= groups[:, i] >> (8 - shift)
    return packed.tobytes()


def unpack(data: bytes, n: int, bits: int, q_min: int) -> np.ndarray:
    """The codes int8 [n] that `pack` turned into `data`. Raises ValueError if the length of `data`
    or the bits after the last code are wrong.
    """
    values, size = _group(bits)
    if len(data) != (expected := packed_size(n, bits)):
        raise ValueError(f"{len(data)} bytes of packed codes, expected {expected}")
    packed = np.frombuffer(data, np.uint8).reshape(-1, size)
    groups = np.empty((len(packed), values), np.uint8)
    for i in range(values):
        byte, shift = divmod(bits * i, 8)
        groups[:, i] = packed[:, byte] >> shift
        if shift + bits > 8:
            groups[:, i] |= packed[:, byte + 1] << (8 - shift)
    groups &= 2**bits - 1
    u = groups.reshape(-1)
    if u[n:].any():
        raise ValueError("the bits after the last packed code are not zero")
    return (u[:n] + np.uint8(q_min % 256)).view(np.int8)


def packed_size(n: int, bits: int) -> int:
    """Bytes that n packed codes take."""
    values, size = _group(bits)
    return -(-n // values) * size


def _group(bits: int) -> tuple[int, int]:
    """The number of codes in the smallest group of whole bytes, and the number of bytes."""
    together = math.lcm(bits, 8)
    return together // bits, together // 8
