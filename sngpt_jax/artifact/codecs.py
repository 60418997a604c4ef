"""Bytes compressed with zstd or lzma, and codes compressed with an entropy coder (rANS).

The caller tells each decoder how much must come out. A decoder raises ValueError if the stream
gives more or less, is damaged, or has bytes after its end. It allocates only a few bytes per
expected byte or code.
"""

import lzma
from typing import Any, Literal

import constriction
import numpy as np
import zstandard

from sngpt_jax.artifact.packing import pack, packed_size, unpack

ByteCodec = Literal["zstd", "lzma"]
LZMA_DICTIONARY = (2**12, 2**26)  # bytes: lzma's minimum, and the dictionary of its level 9

# A frequency takes one byte and has a mantissa of 4 bits: 0, then 17 … 31 times 2^0 and 16 … 31
# times 2^1 … 2^15. The sums of these whole numbers are exact in float64 in any order.
WEIGHTS = np.array([0.0, *((16 + byte % 16) * 2.0 ** (byte // 16) for byte in range(1, 256))])
CLASS_BITS = range(5)  # 1, 2, 4, 8 or 16 classes of rows
REFITS = 2  # rounds that move each row into its best class; more gain less than 0.01 %
NEVER = 1e6  # bits that a class charges for a code that it lacks


def compress(raw: bytes, codec: ByteCodec, level: int) -> bytes:
    """`raw` as one zstd frame that states its size, or as raw LZMA2."""
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(raw)
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_lzma_filters(len(raw), preset=level))


def decompress(data: bytes | memoryview, codec: ByteCodec, size: int) -> bytes:
    """The `size` bytes that `compress` turned into `data`. Raises ValueError for other data."""
    if codec == "zstd":
        if (stated := zstd_size(data)) != size:
            raise ValueError(f"the zstd frame states {stated} bytes, expected {size}")
        try:
            raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
        except zstandard.ZstdError as problem:
            raise ValueError(f"zstd: {problem}") from None
    else:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_lzma_filters(size))
        try:  # one byte more, so that the decoder reads the end mark
            raw = decoder.decompress(data, max_length=size + 1)
        except lzma.LZMAError as problem:
            raise ValueError(f"lzma: {problem}") from None
        if not decoder.eof or decoder.unused_data:
            raise ValueError("lzma: the stream does not end where it should")
    if len(raw) != size:
        raise ValueError(f"{codec} gave {len(raw)} bytes, expected {size}")
    return raw


def zstd_size(data: bytes | memoryview) -> int:
    """The number of bytes that a zstd frame states, which zstandard allocates whatever
    `max_output_size` is. The decoder also allocates the frame's window, so a window beyond the
    content is an error. Raises ValueError for anything but a frame of `compress`.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
    except zstandard.ZstdError as problem:
        raise ValueError(f"no zstd frame: {problem}") from None
    size = frame.content_size
    if size == zstandard.CONTENTSIZE_UNKNOWN:
        raise ValueError("the zstd frame does not state its size")
    if frame.window_size > max(size, 1024):
        raise ValueError(f"the zstd frame has a window of {frame.window_size} bytes for {size}")
    return size


def _lzma_filters(size: int, **options: int) -> list[dict[str, Any]]:
    """The decoder allocates its dictionary, so the dictionary's size follows from the content's."""
    least, most = LZMA_DICTIONARY
    return [{"id": lzma.FILTER_LZMA2, "dict_size": min(max(size, least), most), **options}]


def split_planes(values: np.ndarray) -> bytes:
    """Floats [n] as all their lowest bytes, then all their next bytes, and so on. Planes of signs
    and exponents compress, planes of mantissas do not.
    """
    little = np.ascontiguousarray(values.reshape(-1), values.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def join_planes(raw: bytes, dtype: np.dtype) -> np.ndarray:
    """The floats [n] that `split_planes` turned into `raw`."""
    planes = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1)
    little = np.ascontiguousarray(planes.T).view(dtype.newbyteorder("<")).reshape(-1)
    return little.astype(dtype, copy=False)


def entropy(codes: np.ndarray) -> float:
    """Bits per code of any shape: the lower bound for a coder that models all codes alike."""
    shares = np.unique_counts(codes).counts / codes.size
    return float(-(shares * np.log2(shares)).sum())


def encode_codes(codes: np.ndarray, bits: int, q_min: int) -> bytes:
    """Codes int8 [rows, columns], each q_min … 2^(bits - 1) - 1, by rANS (Duda 2013, arXiv
    1311.2540).

    Rows differ in spread, so up to 16 classes of rows have their own frequencies. The encoder takes
    the number of classes with the fewest bytes. Layout: log2 of the number of classes, the packed
    classes of the rows, one byte per class and code, the coder's 32-bit words.
    """
    rows, alphabet = len(codes), 2 ** (bits - 1) - q_min
    u = codes.view(np.uint8) - np.uint8(q_min % 256)
    cells = u + np.arange(rows)[:, None] * alphabet
    counts = np.bincount(cells.reshape(-1), minlength=rows * alphabet)
    counts = counts.reshape(rows, alphabet).astype(np.float64)
    size, classes, table = _fit_classes(counts, 0)
    for class_bits in CLASS_BITS[1:]:
        finer = _fit_classes(counts, class_bits)
        if finer[0] >= size:
            break
        size, classes, table = finer
    class_bits = len(table).bit_length() - 1
    coder = constriction.stream.stack.AnsCoder()
    for k in reversed(range(len(table))):  # a stack: the decoder starts with the last class
        symbols = u[classes == k].reshape(-1).astype(np.int32)
        if symbols.size:
            coder.encode_reverse(symbols, _model(table[k]))
    words = coder.get_compressed().astype("<u4").tobytes()
    indices = pack(classes.astype(np.int8), class_bits, 0) if class_bits else b""
    return bytes([class_bits]) + indices + table.tobytes() + words


def decode_codes(
    data: bytes | memoryview, rows: int, columns: int, bits: int, q_min: int
) -> np.ndarray:
    """The codes int8 [rows, columns] that `encode_codes` turned into `data`."""
    alphabet = 2 ** (bits - 1) - q_min
    if not len(data) or data[0] not in CLASS_BITS:
        raise ValueError("a rans stream does not begin with its number of classes")
    class_bits = data[0]
    table_start = 1 + (packed_size(rows, class_bits) if class_bits else 0)
    words_start = table_start + 2**class_bits * alphabet
    if len(data) < words_start or (len(data) - words_start) % 4:
        raise ValueError("a rans stream has incomplete tables or words")
    classes = np.zeros(rows, np.int8)
    if class_bits:
        classes = unpack(bytes(data[1:table_start]), rows, class_bits, 0)
    table = np.frombuffer(data[table_start:words_start], np.uint8).reshape(-1, alphabet)
    words = np.frombuffer(data[words_start:], "<u4").astype(np.uint32)
    codes = np.empty((rows, columns), np.int8)
    try:
        coder = constriction.stream.stack.AnsCoder(words)
    except ValueError:
        raise ValueError("a rans stream ends in a word of zeros") from None
    for k, count in enumerate(np.bincount(classes)):
        if count and not table[k].any():
            raise ValueError("a rans stream has a class of rows without frequencies")
        if count:
            symbols = coder.decode(_model(table[k]), int(count) * columns)
            symbols += q_min
            codes[classes == k] = symbols.reshape(-1, columns)
    if not coder.is_empty():
        raise ValueError("a rans stream is damaged or continues after its last code")
    return codes


def _model(frequencies: np.ndarray) -> constriction.stream.model.Categorical:
    """The model of one class. A code of frequency 0 keeps the smallest probability, 2^-24."""
    return constriction.stream.model.Categorical(WEIGHTS[frequencies], perfect=False, lazy=False)


def _fit_classes(counts: np.ndarray, class_bits: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Size in bytes, class of each row [rows] and frequencies' bytes [classes, alphabet], for
    counts [rows, alphabet]. Lloyd's algorithm starts from classes of equal size by spread.
    """
    num_classes = 2**class_bits
    rows, alphabet = counts.shape
    values = np.arange(alphabet)
    total = counts.sum(axis=1)
    spread = counts @ values**2 / total - (counts @ values / total) ** 2
    classes = np.empty(rows, np.int64)
    classes[np.argsort(spread, kind="stable")] = np.arange(rows) * num_classes // rows
    for _ in range(REFITS if class_bits else 0):
        costs = _costs(_frequencies(counts, classes, num_classes))
        classes = np.argmin(np.einsum("ra,ka->rk", counts, costs), axis=1)
    table = _frequencies(counts, classes, num_classes)
    cost = np.einsum("ra,ra->", counts, _costs(table)[classes]) / 2**10
    return (cost + rows * class_bits) / 8 + table.size, classes, table


def _frequencies(counts: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """The byte [classes, alphabet] of the weight nearest to each frequency, or of the smallest
    weight for a rare code.
    """
    sums = np.stack([counts[classes == k].sum(axis=0) for k in range(num_classes)])
    weights = sums * (WEIGHTS[-1] / np.maximum(sums.max(axis=1, keepdims=True), 1))
    nearest = np.searchsorted((WEIGHTS[1:] + WEIGHTS[:-1]) / 2, weights)
    return np.where(sums > 0, np.maximum(nearest, 1), 0).astype(np.uint8)


def _costs(table: np.ndarray) -> np.ndarray:
    """The cost [classes, alphabet] of a code in 2^-10 bits. The sums of these whole numbers do not
    depend on their order.
    """
    weights = WEIGHTS[table]
    total = weights.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.log2(total) - np.log2(weights)
    return np.round(np.where(weights > 0, bits, NEVER) * 2**10)
