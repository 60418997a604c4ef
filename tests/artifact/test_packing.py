"""Packed codes against golden bytes and against one long Python integer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.artifact.packing import pack, packed_size, unpack


@pytest.mark.parametrize(
    ("bits", "values", "packed", "first"),
    [  # Σ u_i 2^(5i) of u = 1 … 8 is 0x41CC520C41; 1 + 2·2^6 + 3·2^12 + 62·2^18 = 0xF83081
        (5, [1, 2, 3, 4, 5, 6, 7, 8], "41 0C 52 CC 41", "01 00 00 00 00"),
        (6, [1, 2, 3, 62], "81 30 F8", "01 00 00"),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_golden_bytes(bits, values, packed, first, full):
    q_min = 1 - 2 ** (bits - 1) - full
    codes = (np.array(values) + q_min).astype(np.int8)
    assert pack(codes, bits, q_min) == bytes.fromhex(packed)
    assert pack(codes[:1], bits, q_min) == bytes.fromhex(first)
    assert list(unpack(bytes.fromhex(packed), len(values), bits, q_min)) == list(codes)


@given(st.integers(1, 8), st.booleans(), st.lists(st.integers(0, 255), max_size=40))
def test_bits_stand_in_the_order_of_one_little_endian_integer(bits, full, values):
    q_max = 2 ** (bits - 1) - 1
    q_min = -q_max - full
    u = [value % (q_max - q_min + 1) for value in values]
    codes = np.array(u, int).astype(np.int16) + q_min
    data = pack(codes.astype(np.int8), bits, q_min)
    assert int.from_bytes(data, "little") == sum(value << (bits * i) for i, value in enumerate(u))
    assert len(data) == packed_size(len(u), bits)
    unpacked = unpack(data, len(u), bits, q_min)
    assert unpacked.dtype == np.int8 and list(unpacked) == list(codes)


def test_sizes_are_whole_groups():
    assert [packed_size(n, 5) for n in (0, 1, 8, 9)] == [0, 5, 5, 10]
    assert [packed_size(n, 6) for n in (0, 1, 4, 5)] == [0, 3, 3, 6]
    assert [packed_size(3, bits) for bits in (2, 3, 4, 7, 8)] == [1, 3, 2, 7, 3]


def test_damage_is_seen():
    data = pack(np.array([15, -15, 0], np.int8), 5, -15)
    for damaged, problem in (
        (data[:-1], "4 bytes of packed codes, expected 5"),
        (data + b"\0", "expected 5"),
        (data[:-1] + b"\x80", "after the last packed code are not zero"),
    ):
        with pytest.raises(ValueError, match=problem):
            unpack(damaged, 3, 5, -15)
