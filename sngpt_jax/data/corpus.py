"""Sources of text: the interpreter's own library, files, and Hugging Face.

One string names a source (`FORMS`). Its documents have a fixed order, so that the first n can be
held out and an interrupted preparation can resume.
"""

import hashlib
import importlib
import io
import json
import logging
import os
import platform
import re
import shlex
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.data import zstd
from sngpt_jax.data.manifest import DataError, explained
from sngpt_jax.data.tokenizer import replace_surrogates

logger = logging.getLogger("sngpt_jax")

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (".txt", ".txt.gz", ".txt.zst", *JSONL, ".parquet")
FORMS = f"stdlib, hub:NAME[:CONFIG][@SPLIT], a folder, or a file ending in {', '.join(ENDINGS)}"
SEPARATOR = "<|endoftext|>"  # a line of a text file with only this text ends a document

MAX_DOCUMENT = 2**30  # bytes of a line, characters of a document: small files may unpack to more
_TOO_LONG = f"a document of more than {MAX_DOCUMENT:,} bytes; put lines of {SEPARATOR} in between"

MAX_PARTS = 1000  # of a source: a Slurm array has at most 1001 tasks by default

_HASHED_BYTES = 256 * 2**20  # smaller texts are identified by their content
_SKIPPED_FOLDERS = re.compile(
    "tests?|idle_test|site-packages|dist-packages|__pycache__|lib-dynload|config-.*"
)
_HUB = re.compile(r"hub:(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>.+))?")


def documents(source: str, part: int = 0, parts: int = 1) -> Iterator[str]:
    """Yields the documents of `source` without empty ones; lone surrogates become U+FFFD.

    Part `part` of `parts` (at most `count_parts(source)`) is a run of whole files; the parts 0, 1,
    … together are all documents in order. The call raises `UserError` for a source that does not
    exist; the iterator raises `DataError` for damaged text.
    """
    if source.startswith("hub:"):
        texts = _hub_texts(source, _hub_parts(source), part, parts)
    else:
        files = _files(source)
        files = files[len(files) * part // parts : len(files) * (part + 1) // parts]
        read = _stdlib_texts if source == "stdlib" else _file_texts
        texts = (text for path in files for text in read(path))
    return (replace_surrogates(text) for text in texts if text)


def count_parts(source: str) -> int:
    """How many parts `documents` can cut `source` into: one per file, but at most `MAX_PARTS`."""
    if not source.startswith("hub:"):
        return min(len(_files(source)), MAX_PARTS)
    with explained(lambda: f"source {source}: the data set's files cannot be listed"):
        return min(_load_hub(*_hub_parts(source)).num_shards, MAX_PARTS)


def text_bytes(source: str) -> int:
    """The bytes of text in `source`, if its files' sizes tell; else 0."""
    files = [] if source.startswith("hub:") else _files(source)
    known = all(path.suffix in (".py", ".txt") for path in files)
    return sum(path.stat().st_size for path in files) if known else 0


def fingerprint(source: str) -> str:
    """A short name for the content of `source`, wherever it lies: its kind, how many files, and a
    hash of their names and contents.

    For 256 MiB of text or more, sizes and modification times stand in for the contents. A Hugging
    Face data set is identified by its name.
    """
    if source.startswith("hub:"):
        name, config, split = _hub_parts(source)
        return f"hub:{name}:{config or 'default'}@{split}"
    kind, root, files = "files", Path(source), _files(source)
    if source == "stdlib":
        kind, root = f"stdlib {platform.python_version()}", _stdlib_root()
    elif root.is_file():
        root = root.parent
    stats = [path.stat() for path in files]
    by_content = sum(stat.st_size for stat in stats) < _HASHED_BYTES
    digest = hashlib.sha256()
    for path, stat in zip(files, stats, strict=True):
        times = f"{stat.st_size} {stat.st_mtime_ns}"
        content = file_sha256(path, DataError) if by_content else times
        digest.update(f"{path.relative_to(root).as_posix()}\0{content}\0".encode())
    return f"{kind}, {len(files)} files, {digest.hexdigest()[:16]}"


def imported(package: str, what: str) -> Any:
    """The module of an optional package that `what` needs. Raises `UserError` with the command
    that installs it.
    """
    # The hub's client would log every retry. The last failure is an exception anyway.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not logger.isEnabledFor(logging.INFO):
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        return importlib.import_module(package)
    except ImportError:
        pip = shlex.join([sys.executable, "-m", "pip", "install", package])
        raise UserError(f"{what} needs the package {package}; install it: {pip}") from None


def _files(source: str) -> list[Path]:
    return _stdlib_files() if source == "stdlib" else _text_files(source)


# ---------------------------------------- the standard library


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    """The library's Python files without its tests, ordered by a hash: any prefix is a sample."""
    root = _stdlib_root()
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name)]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise UserError(f"source stdlib: no .py files under {root}; give a file or folder of text")

    def place(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

    return sorted(files, key=place)


def _stdlib_texts(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as file:  # decodes as PEP 263 says
            yield file.read()
    except (SyntaxError, UnicodeDecodeError):
        return  # a few files are test data in another encoding than they declare


# ---------------------------------------- files


def _text_files(source: str) -> list[Path]:
    """The files of text at `source`, ordered by name."""
    path = Path(source)
    if not source or not path.exists():  # Path("") is the current folder
        raise UserError(f"source {source!r}: no such file or folder; a source is {FORMS}")
    found = [path] if path.is_file() else path.rglob("*")
    files = [p for p in found if p.name.endswith(ENDINGS) and p.is_file()]
    if not files:
        raise UserError(f"{path}: no text; expected files ending in {', '.join(ENDINGS)}")
    return sorted(files, key=lambda p: p.relative_to(path).as_posix())


def _file_texts(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        return _parquet_texts(path)
    return _jsonl_texts(path) if path.name.endswith(JSONL) else _txt_texts(path)


def _unpacked(path: Path) -> Any:
    """The file's bytes, raw. Members of gzip and frames of zstd are read on over their ends."""
    if path.suffix == ".zst":
        return zstd.Reader(path)
    import pyarrow  # a large library that only the preparation needs

    return pyarrow.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line with its end) of a plain or compressed file, without a BOM."""
    number = 0
    with explained(lambda: f"{path}:{number}: cannot be read"):
        if path.suffix in (".gz", ".zst") and not path.stat().st_size:
            raise OSError("the file is empty")
        with io.BufferedReader(_unpacked(path)) as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_DOCUMENT + 1), b""), 1):
                if len(line) > MAX_DOCUMENT:
                    raise DataError(f"{path}:{number}: {_TOO_LONG}")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")


def _txt_texts(path: Path) -> Iterator[str]:
    """The runs of lines between separators."""
    lines: list[str] = []
    size = 0
    for number, line in _lines(path):
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(lines)
            lines, size = [], 0
            continue
        lines.append(line)
        size += len(line)
        if size > MAX_DOCUMENT:
            raise DataError(f"{path}:{number}: {_TOO_LONG}")
    yield "".join(lines)


def _jsonl_texts(path: Path) -> Iterator[str]:
    """The key `text` of each line."""
    number = 0
    with explained(lambda: f"{path}:{number}: not JSON"):
        for number, line in _lines(path):
            if line.strip():
                yield _text_of(json.loads(line), f"{path}:{number}")


def _text_of(row: Any, where: str) -> str:
    """The text of a row of any source that has rows."""
    match row:
        case {"text": str(text)}:
            return text
        case {"text": other}:
            found = f"{type(other).__name__} there"
        case {}:
            found = f"the keys {', '.join(map(repr, list(row)[:8])) or '(none)'}"
        case _:
            found = f"{type(row).__name__} in place of an object"
    raise DataError(f"{where}: expected a string under the key 'text', found {found}")


def _parquet_texts(path: Path) -> Iterator[str]:
    """The column `text` of each row."""
    from pyarrow import parquet  # a large library that only this function needs

    row = 0
    with explained(lambda: f"{path}: row {row}: cannot be read"), parquet.ParquetFile(path) as file:
        if "text" not in (columns := file.schema_arrow.names):
            raise DataError(f"{path}: no column 'text'; columns: {', '.join(columns)}")
        # decodes one row group's pages at a time
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            for value in batch.column(0):
                row += 1
                yield _text_of({"text": value.as_py()}, f"{path}: row {row}")


# ---------------------------------------- Hugging Face

Hub = tuple[str, str | None, str]  # name, configuration and split of a data set


def _hub_parts(source: str) -> Hub:
    """What `source` names; raises `UserError`."""
    match = _HUB.fullmatch(source)
    if not match:
        raise UserError(f"source {source!r}: expected hub:NAME[:CONFIG][@SPLIT]")
    return match["name"], match["config"], match["split"] or "train"


def _load_hub(name: str, config: str | None, split: str) -> Any:
    datasets = imported("datasets", f"source hub:{name}")
    return datasets.load_dataset(name, config, split=split, streaming=True)


def _hub_texts(source: str, hub: Hub, part: int, parts: int) -> Iterator[str]:
    row = 0
    with explained(lambda: f"source {source}: the data set fails after row {row}"):
        data = _load_hub(*hub)
        for values in data.shard(parts, part) if parts > 1 else data:  # a run of whole files
            row += 1
            yield _text_of(values, f"{source}: row {row}")
