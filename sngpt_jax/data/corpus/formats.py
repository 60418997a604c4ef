"""The documents of one file, by its format, in bounded memory."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from sngpt_jax.base import typed_json
from sngpt_jax.data import zstd
from sngpt_jax.data.corpus.files import TEXT, format_of
from sngpt_jax.data.corpus.reading import MAX_ROW, SEPARATOR, Reading, check_size, listed, text_of
from sngpt_jax.data.manifest import DataError, explained

# A compressed file may unpack to this many bytes and this multiple of its size together. Text is
# seldom 20 times as large.
FREE = 64 * 2**20
MAX_RATIO = 100

_BOM = b"\xef\xbb\xbf"
_BLOCK = 2**16  # bytes of text that are read at a time
_LINE_END = re.compile(rb"\r?(?:\n|\Z)")


def file_texts(path: Path, reading: Reading) -> Iterator[str]:
    """The documents of a file in their order. The iterator raises `DataError`."""
    ending, _ = format_of(path)
    if ending in TEXT:
        return _text_texts(path, reading.split_on)
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[ending]
    return read(path, reading.text_key)


# ---------------------------------------- bytes


def _most(size: int) -> int:
    """How many bytes the `size` bytes of a compressed file may unpack to."""
    return FREE + MAX_RATIO * size


def _refuse_ratio(path: Path, size: int) -> NoReturn:
    most = f"its {size:,} compressed bytes unpack to more than {_most(size):,}"
    raise DataError(f"{path}: {most}; if that is right, store it without compression")


class _Bounded(io.RawIOBase):
    """The bytes that a file's stream unpacks. Raises `DataError` if they are too many."""

    def __init__(self, stream: Any, path: Path):
        self._stream, self._path, self._size = stream, path, path.stat().st_size
        self._left = _most(self._size)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            _refuse_ratio(self._path, self._size)
        return count


def _opened(path: Path) -> io.BufferedReader:
    """The file's bytes. Members of gzip and frames of zstd are read on over their ends."""
    _, packed = format_of(path)
    if packed and not path.stat().st_size:
        raise OSError("the file is empty")
    if not packed:
        return open(path, "rb")
    if packed == ".zst":
        return io.BufferedReader(_Bounded(zstd.Reader(path), path))
    import pyarrow  # a large library that only the preparation needs

    stream = pyarrow.input_stream(str(path), compression="gzip")
    return io.BufferedReader(_Bounded(stream, path))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line with its end), without a BOM."""
    number = 0
    with explained(lambda: f"{path}:{number}: cannot be read"), _opened(path) as file:
        for number, line in enumerate(iter(partial(file.readline, MAX_ROW + 1), b""), 1):
            if len(line) > MAX_ROW:
                raise DataError(f"{path}:{number}: a line of more than {MAX_ROW:,} bytes")
            yield number, line.removeprefix(_BOM) if number == 1 else line


# ---------------------------------------- text


def _text_texts(path: Path, split_on: str) -> Iterator[str]:
    """The text between separators."""
    line = 1  # where the document begins

    def where() -> str:
        return f"{path}:{line}"

    with explained(lambda: f"{where()}: cannot be read"), _opened(path) as file:
        blocks = iter(partial(file.read, _BLOCK), b"")
        first = next(blocks, b"").removeprefix(_BOM)
        for document, separator in cut(chain([first], blocks), split_on, where):
            try:
                text = document.decode()
            except UnicodeDecodeError as problem:
                line += document.count(b"\n", 0, problem.start)
                raise
            line += document.count(b"\n") + separator.count(b"\n")
            document.clear()  # text and bytes would take twice the memory
            yield text


def cut(
    blocks: Iterable[bytes], split_on: str, where: Callable[[], str]
) -> Iterator[tuple[bytearray, bytes]]:
    """Cuts the text in `blocks` into documents. Yields each with the separator after it.

    A separator is `split_on` anywhere, with the end of its line if it fills the line. If `split_on`
    is empty, a separator is a line of `SEPARATOR` alone. Raises `DataError` for a document that is
    too large.
    """
    mark = (split_on or SEPARATOR).encode()
    document = bytearray()
    window = b"\n"  # the byte before, and what is not searched yet
    for block in chain(blocks, [b""]):
        last = not block
        window += block
        start = look = 1
        while (at := window.find(mark, look)) >= 0:
            end = at + len(mark)
            if not last and end + 2 > len(window):  # the end of the line is not here yet
                break
            begins = window[at - 1 : at] == b"\n"
            line_end = _LINE_END.match(window, end) if begins and mark[-1:] != b"\n" else None
            if not line_end and not split_on:
                look = at + 1
                continue
            document += window[start:at]
            check_size(len(document), where())
            start = look = line_end.end() if line_end else end
            yield document, window[at:start]
            document = bytearray()
        kept = len(window) if last else max(start, len(window) - len(mark) - 2)
        document += window[start:kept]
        check_size(len(document), where())
        window = window[kept - 1 :]
    yield document, b""


# ---------------------------------------- rows


def _loads(content: bytes, where: str) -> Any:
    try:
        return typed_json.loads(content, lone_surrogates=True)
    except ValueError as problem:
        raise DataError(f"{where}: cannot be read as JSON: {problem}") from None


def _jsonl(path: Path, key: str) -> Iterator[str]:
    """The key of each line."""
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield text_of(_loads(line, where), key, where)


def _json(path: Path, key: str) -> Iterator[str]:
    """The key of the file's object, or of each object in its list, which may also hold strings."""
    with explained(lambda: f"{path}: cannot be read"), _opened(path) as file:
        content = file.read(MAX_ROW + 1)
    if len(content) > MAX_ROW:
        remedy = "give its list as lines of JSON: jq -c '.[]' FILE.json > FILE.jsonl"
        raise DataError(f"{path}: more than {MAX_ROW:,} bytes; {remedy}")
    value = _loads(content.removeprefix(_BOM), f"{path}")
    rows, where = (value, "item ") if isinstance(value, list) else ([value], "object ")
    for number, row in enumerate(rows, 1):
        if isinstance(value, list) and isinstance(row, str):
            row = {key: row}
        yield text_of(row, key, f"{path}: {where}{number}")


def _csv(path: Path, key: str) -> Iterator[str]:
    """The column of each row. The first row names the columns."""
    size = 0  # of the row so far, which may have several lines

    def lines() -> Iterator[str]:
        nonlocal size
        for number, line in _lines(path):
            size += len(line)
            if size > MAX_ROW:
                unclosed = "perhaps a quote is not closed"
                raise DataError(
                    f"{path}:{number}: a row of more than {MAX_ROW:,} bytes; {unclosed}"
                )
            try:
                yield line.decode()
            except UnicodeDecodeError as problem:
                raise DataError(f"{path}:{number}: cannot be read: {problem}") from None

    csv.field_size_limit(MAX_ROW)  # of the process; only this function reads such files
    rows = csv.reader(lines(), strict=True)
    with explained(lambda: f"{path}:{rows.line_num}: cannot be read"):
        columns = next(rows, [])
        _check_columns(path, columns, key)
        place = columns.index(key)
        for row in rows:
            size = 0
            if row and len(row) != len(columns):  # an empty line has no columns
                expected = f"expected {len(columns)} columns as the first line names"
                raise DataError(f"{path}:{rows.line_num}: {expected}, found {len(row)}")
            if row:
                yield row[place]


def _parquet(path: Path, key: str) -> Iterator[str]:
    """The column of each row."""
    from pyarrow import parquet  # a large library that only this function needs

    row = 0
    with explained(lambda: f"{path}: row {row}: cannot be read"), parquet.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names, key)
        _check_pages(path, file.metadata, key)
        # One row at a time: a value that is stored once may stand in every row. The threads would
        # take four times as long.
        for batch in file.iter_batches(batch_size=1, columns=[key], use_threads=False):
            for value in batch.column(key):
                row += 1
                yield text_of({key: value.as_py()}, key, f"{path}: row {row}")


def _check_columns(path: Path, columns: list[str], key: str) -> None:
    """Raises `DataError` unless one column has the name."""
    if (count := columns.count(key)) != 1:
        found = f"{count} columns {key!r}" if count else f"no column {key!r}"
        remedy = "rename one" if count else "name one with --text-key"
        raise DataError(f"{path}: {found}; columns: {listed(columns)}; {remedy}")


def _check_pages(path: Path, metadata: Any, key: str) -> None:
    """Raises `DataError` if the column's pages unpack to too many bytes."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for place in range(group.num_columns):
            column = group.column(place)
            packed = column.total_compressed_size
            ours = column.path_in_schema.partition(".")[0] == key
            if ours and column.total_uncompressed_size > _most(packed):
                _refuse_ratio(path, packed)
