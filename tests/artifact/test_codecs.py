"""Codecs against the libraries' formats, a rANS decoder of whole numbers, and known entropies."""

import lzma
import math
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sngpt_jax.artifact import codecs
from sngpt_jax.artifact.codecs import compress, decode_codes, decompress, encode_codes, entropy
from tests.artifact.by_hand import quantized

TEXT = b"to be or not to be, that is the question " * 50
BYTE_CODECS = [("zstd", 22), ("zstd", 1), ("lzma", 9), ("lzma", 0)]


# ---------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(("codec", "level"), BYTE_CODECS)
@given(raw=st.binary(max_size=300))
def test_bytes_come_back(codec, level, raw):
    assert decompress(compress(raw, codec, level), codec, len(raw)) == raw


def test_streams_have_the_libraries_own_formats():
    frame = compress(TEXT, "zstd", 22)
    assert zstandard.ZstdDecompressor().decompress(frame) == TEXT
    assert zstandard.get_frame_parameters(frame).content_size == len(TEXT)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
    assert lzma.decompress(compress(TEXT, "lzma", 9), lzma.FORMAT_RAW, filters=filters) == TEXT
    assert len(compress(TEXT, "lzma", 9)) < 120 and len(frame) < 120


@pytest.mark.parametrize(("codec", "level"), BYTE_CODECS)
def test_a_stream_of_another_length_or_end_is_refused(codec, level):
    stream = compress(TEXT, codec, level)
    size = len(TEXT)
    cases = [(stream, n) for n in (0, size - 1, size + 1)]
    cases += [(data, size) for data in (stream + b"\0", stream + stream)]
    for data, expected in [*cases, *((stream[:n], size) for n in range(len(stream)))]:
        with pytest.raises(ValueError, match="zstd|lzma"):
            decompress(data, codec, expected)


@pytest.mark.parametrize("codec", ["zstd", "lzma"])
def test_a_bomb_takes_no_memory(codec):
    bomb = compress(bytes(10_000_000), codec, 1)
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected 1000|does not end where it should"):
        decompress(bomb, codec, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_zstd_frame_with_a_forged_size_is_refused():
    frame = bytearray(compress(TEXT, "zstd", 1))
    assert frame[4] >> 6 == 1  # two bytes of size, less 256, follow the descriptor
    frame[5:7] = (1000 - 256).to_bytes(2, "little")
    assert codecs.zstd_size(bytes(frame)) == 1000
    with pytest.raises(ValueError, match="zstd"):
        decompress(bytes(frame), "zstd", 1000)


def test_a_zstd_frame_without_its_size_or_with_a_large_window_is_refused():
    with pytest.raises(ValueError, match="does not state its size"):
        codecs.zstd_size(zstandard.ZstdCompressor(write_content_size=False).compress(TEXT))
    # Magic; descriptor: size in 4 bytes, no single segment; window 2^(10 + 17); size 2050; one
    # last raw block of nothing.
    wide = bytes.fromhex("28B52FFD 80 88 02080000 010000")
    assert zstandard.get_frame_parameters(wide).window_size == 2**27
    with pytest.raises(ValueError, match="window of 134217728 bytes for 2050"):
        codecs.zstd_size(wide)


def test_the_lzma_dictionary_follows_from_the_size_alone():
    (least,), (usual,), (most,) = (codecs._lzma_filters(size) for size in (1, 100_000, 2**40))
    assert (least["dict_size"], usual["dict_size"], most["dict_size"]) == (4096, 100_000, 2**26)


def test_planes_of_floats():
    halves = np.array([1.0, -2.0, 0.1], np.float16)  # 0x3C00, 0xC000, 0x2E66
    assert codecs.split_planes(halves) == bytes.fromhex("00 00 66  3C C0 2E")
    singles = np.array([[1.0, -2.5]], np.float32)  # 0x3F800000, 0xC0200000
    assert codecs.split_planes(singles) == bytes.fromhex("00 00  00 00  80 20  3F C0")
    for values in (halves, singles.reshape(-1)):
        joined = codecs.join_planes(codecs.split_planes(values), values.dtype)
        np.testing.assert_array_equal(joined, values, strict=True)


# ---------------------------------------------------------------------------------- codes


def decode_with_whole_numbers(data, rows, columns, bits, q_min):
    """The format again, in whole numbers: a state of 64 bits, words of 32, probabilities of 24."""
    alphabet = 2 ** (bits - 1) - q_min
    class_bits = data[0]
    per_byte = {0: 1, 1: 8, 2: 4, 3: 8, 4: 2}[class_bits]
    size = -(-rows // per_byte) * class_bits * per_byte // 8
    indices = int.from_bytes(data[1 : 1 + size], "little")
    classes = [indices >> (class_bits * row) & (2**class_bits - 1) for row in range(rows)]
    position = 1 + size
    words = list(np.frombuffer(data[position + 2**class_bits * alphabet :], "<u4").tolist())
    state = 0
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    codes = np.zeros((rows, columns), np.int8)
    for k in range(2**class_bits):
        frequencies = data[position + k * alphabet : position + (k + 1) * alphabet]
        weights = [((16 + byte % 16) << (byte // 16)) if byte else 0 for byte in frequencies]
        lefts = [0]
        for i in range(1, alphabet):
            share = (2**24 - alphabet) / max(sum(weights), 1)
            lefts.append(math.floor(sum(weights[:i]) * share) + i)
        lefts.append(2**24)
        for row in range(rows):
            for column in range(columns if classes[row] == k else 0):
                quantile = state % 2**24
                symbol = max(i for i in range(alphabet) if lefts[i] <= quantile)
                width = lefts[symbol + 1] - lefts[symbol]
                state = (state >> 24) * width + quantile - lefts[symbol]
                if state < 2**32 and words:
                    state = state << 32 | words.pop()
                codes[row, column] = symbol + q_min
    assert state == 0 and not words
    return codes


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "spread"),
    [(1, 1, 2, 0.0), (7, 40, 3, 0.0), (40, 100, 5, 1.0), (9, 60, 8, 0.5)],
)
def test_codes_decode_with_whole_numbers(rows, columns, bits, spread):
    codes = quantized(rows, columns, bits, spread=spread).codes
    data = encode_codes(codes, bits, 1 - 2 ** (bits - 1))
    found = decode_with_whole_numbers(data, rows, columns, bits, 1 - 2 ** (bits - 1))
    np.testing.assert_array_equal(found, codes)


def test_a_stream_has_the_bytes_it_always_had():
    """May change only with `artifact.VERSION`: it decodes what was written before."""
    codes = np.array([[0, 1, -1, 0, 0, 2, -3, 0], [0, 0, 0, 1, -1, 0, 3, 1]], np.int8)
    # one class; frequencies of -3 to 3; words
    golden = bytes.fromhex("00 CF00DFFFE7CFCF 8AA37261 DF574C00")
    assert encode_codes(codes, 3, -3) == golden


@given(
    bits=st.integers(2, 8),
    full=st.booleans(),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_come_back(bits, full, rows, columns, seed):
    q_min = 1 - 2 ** (bits - 1) - full
    rng = np.random.default_rng(seed)
    highest = rng.integers(q_min, 2 ** (bits - 1), (rows, 1))
    codes = rng.integers(q_min, highest + 1, (rows, columns)).astype(np.int8)
    data = encode_codes(codes, bits, q_min)
    np.testing.assert_array_equal(
        decode_codes(data, rows, columns, bits, q_min), codes, strict=True
    )


def test_entropy_of_known_shares():
    assert entropy(np.array([3, 3, 3], np.int8)) == 0
    assert entropy(np.repeat(np.arange(-4, 4), 5).astype(np.int8)) == pytest.approx(3, abs=1e-12)
    assert entropy(np.array([0, 0, 1, 2], np.int8)) == pytest.approx(1.5, abs=1e-12)


@pytest.mark.parametrize(("rows", "bits"), [(200, 5), (200, 6), (200, 4), (512, 8)])
def test_equal_rows_cost_their_entropy(rows, bits):
    """Within 0.3 %, tables included."""
    codes = quantized(rows, 512, bits).codes
    bits_per_code = 8 * len(encode_codes(codes, bits, 1 - 2 ** (bits - 1))) / codes.size
    assert entropy(codes) - 0.001 < bits_per_code < 1.003 * entropy(codes)


def test_rows_that_differ_cost_less_than_their_entropy():
    codes = quantized(512, 512, 5, spread=0.5).codes
    bits_per_code = 8 * len(encode_codes(codes, 5, -15)) / codes.size
    of_rows = np.mean([entropy(row) for row in codes])
    assert of_rows < bits_per_code < of_rows + 0.4 * (entropy(codes) - of_rows)


def test_damaged_codes_are_refused():
    codes = quantized(30, 50, 5, spread=1.0).codes
    data = encode_codes(codes, 5, -15)
    tables = 1 + codecs.packed_size(30, data[0])
    assert data[0] > 0
    words = tables + 2 ** data[0] * 31
    empty_class = data[:tables] + bytes(2 ** data[0] * 31) + data[words:]
    cases = {
        "does not begin with its number": [b"", b"\x05" + data[1:]],
        "incomplete tables or words": [data[:1], data[: words - 1], data[:-1], data + b"\1"],
        "ends in a word of zeros": [data + bytes(4)],
        "damaged or continues after": [
            *(data[:-4], data[:-8], data + b"\1\0\0\0"),
            data[:words] + data[words + 4 :],
        ],
        "without frequencies": [empty_class],
    }
    for message, streams in cases.items():
        for stream in streams:
            with pytest.raises(ValueError, match=message):
                decode_codes(stream, 30, 50, 5, -15)
