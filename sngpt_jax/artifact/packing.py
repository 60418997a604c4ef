"""Codes of fewer than 8 bits put together bit by bit.

Bits are little-endian: value i of the unsigned codes u = q - q_min stands at bits b·i to b·i + b -
1, byte j holds bits 8j to 8j + 7. The values are filled up with zeros to a whole number of bytes'
worth: int5 keeps 8 values in 5 bytes, int6 keeps 4 in 3.
"""

import math

import numpy as np


def pack(codes: np.ndarray, bits: int, q_min: int) -> bytes:
    """Codes int8 [n], each q_min … q_min + 2^bits - 1, as bytes; bits 1 to 8. Raises ValueError
    for others.
    """
    values, size = _group(bits)
    # modulo 256, where every code of 8 bits or fewer is right
    u = codes.view(np.uint8) - np.uint8(q_min % 256)
    if u.size and int(u.max()) >> bits:
        raise ValueError(
            f"codes from {codes.min()} to {codes.max()} do not fit {bits} bits from {q_min} on"
        )
    groups = np.zeros((-(-u.size // values), values), np.uint8)
    groups.reshape(-1)[: u.size] = u
    packed = np.zeros((len(groups), size), np.uint8)
    for i in range(values):
        byte, shift = divmod(bits * i, 8)
        packed[:, byte] |= groups[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= groups[:, i] >> (8 - shift)
    return packed.tobytes()


def unpack(data: bytes, n: int, bits: int, q_min: int) -> np.ndarray:
    """The codes int8 [n] that `pack` made `data` of.

    Raises ValueError where `data` has another length, codes past 2^(bits - 1) - 1, or fills up
    with other than zeros.
    """
    values, size = _group(bits)
    if len(data) != packed_size(n, bits):
        raise ValueError(f"{len(data)} bytes of packed codes, expected {packed_size(n, bits)}")
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
        raise ValueError("packed codes are followed by other bits than zeros")
    u = u[:n]
    if n and int(u.max()) > 2 ** (bits - 1) - 1 - q_min:
        raise ValueError(f"a packed code is above {2 ** (bits - 1) - 1}")
    u += np.uint8(q_min % 256)
    return u.view(np.int8)


def packed_size(n: int, bits: int) -> int:
    """Bytes that n codes take."""
    values, size = _group(bits)
    return -(-n // values) * size


def _group(bits: int) -> tuple[int, int]:
    """How many values fill how many bytes."""
    together = math.lcm(bits, 8)
    return together // bits, together // 8
