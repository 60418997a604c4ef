"""Documents of a source. One string names a source (`FORMS`).

Its documents have a fixed order, so that the first n can be held out and an interrupted preparation
can resume.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.data.corpus import files
from sngpt_jax.data.corpus.formats import file_texts
from sngpt_jax.data.corpus.hub import hub_parts, hub_texts, load_hub
from sngpt_jax.data.corpus.reading import TEXT_KEY, USUAL, Reading
from sngpt_jax.data.manifest import DataError, explained
from sngpt_jax.data.tokenizer import replace_surrogates

logger = logging.getLogger("sngpt_jax")

FORMS = f"stdlib, hub:NAME[:CONFIG][@SPLIT], a folder, or a file ending in {files.EXPECTED}"

MAX_PARTS = 1000  # of a source: a Slurm array has at most 1001 tasks by default

_HASHED_BYTES = 256 * 2**20  # smaller texts are identified by their content
_SKIPPED_FOLDERS = re.compile(
    "tests?|idle_test|site-packages|dist-packages|__pycache__|lib-dynload|config-.*"
)


def documents(
    source: str, part: int = 0, parts: int = 1, reading: Reading = USUAL
) -> Iterator[str]:
    """Yields the documents of `source` without empty ones; lone surrogates become U+FFFD.

    Part `part` of `parts` (at most `count_parts(source)`) is a run of whole files; the parts 0, 1,
    … together are all documents in order. The call raises `UserError` for a source that does not
    exist; the iterator raises `DataError` for damaged text.
    """
    return (text for _, _, text in named_documents(source, part, parts, reading))


def named_documents(
    source: str, part: int = 0, parts: int = 1, reading: Reading = USUAL
) -> Iterator[tuple[str, int, str]]:
    """The `documents`, each with the name of its file below a folder, and its number in this file
    from 1. The empty ones have numbers, too.
    """
    found: Iterable[tuple[str, Iterable[str]]]
    if source.startswith("hub:"):
        found = [(source, hub_texts(source, hub_parts(source), part, parts, reading.text_key))]
    else:
        paths = _files(source)
        paths = paths[len(paths) * part // parts : len(paths) * (part + 1) // parts]
        root = _root(source)
        read = _stdlib_texts if source == "stdlib" else partial(file_texts, reading=reading)
        found = ((path.relative_to(root).as_posix(), read(path)) for path in paths)
    return (
        (name, number, replace_surrogates(text))
        for name, texts in found
        for number, text in enumerate(texts, 1)
        if text
    )


@contextlib.contextmanager
def as_path(source: str) -> Iterator[str]:
    """`source`, or for - a temporary file with the text of standard input."""
    if source != "-":
        yield source
        return
    if sys.stdin is None:  # closed before Python began
        raise UserError("-: standard input is closed; give a file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "standard_input.txt")
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield str(path)


def count_parts(source: str) -> int:
    """How many parts `documents` can cut `source` into: one per file, but at most `MAX_PARTS`."""
    if not source.startswith("hub:"):
        return min(len(_files(source)), MAX_PARTS)
    with explained(lambda: f"source {source}: the data set's files cannot be listed"):
        return min(load_hub(*hub_parts(source)).num_shards, MAX_PARTS)


def text_bytes(source: str) -> int:
    """The bytes of text in `source`, if its files' sizes tell; else 0."""
    paths = [] if source.startswith("hub:") else _files(source)
    known = all(path.suffix.lower() in files.TEXT for path in paths)
    return sum(path.stat().st_size for path in paths) if known else 0


def check_reading(reading: Reading, sources: Sequence[str]) -> None:
    """Raises `UserError` for an option that no file of `sources` heeds."""
    formats: set[str] = set()
    for source in sources:
        if source.startswith("hub:"):
            formats.add("hub")
        elif source != "stdlib":
            formats |= {files.format_of(path)[0] for path in _files(source)}
    for option, given, heeding in (
        ("--split-on", reading.split_on, files.TEXT),
        ("--text-key", reading.text_key != TEXT_KEY, (*files.ROWS, "hub")),
    ):
        if given and not formats.intersection(heeding):
            kinds = ", ".join(kind for kind in heeding if kind != "hub")
            raise UserError(f"{option}: only {kinds} heed it, and {' and '.join(sources)} has none")


def say_left_out(source: str) -> None:
    """Logs how many files of a folder are left out, because they are of other kinds."""
    if source != "stdlib" and not source.startswith("hub:"):
        found = _find(source)
        if found.others:
            logger.warning(f"{source}: left out {files.left_out(found)}")


def fingerprint(source: str) -> str:
    """A short name for the content of `source`, wherever it lies: its kind, how many files, and a
    hash of their names and contents.

    For 256 MiB of text or more, sizes and modification times stand in for the contents. A Hugging
    Face data set is identified by its name.
    """
    if source.startswith("hub:"):
        name, config, split = hub_parts(source)
        return f"hub:{name}:{config or 'default'}@{split}"
    kind, root, paths = "files", _root(source), _files(source)
    if source == "stdlib":
        kind = f"stdlib {platform.python_version()}"
    stats = [path.stat() for path in paths]
    by_content = sum(stat.st_size for stat in stats) < _HASHED_BYTES
    digest = hashlib.sha256()
    for path, stat in zip(paths, stats, strict=True):
        times = f"{stat.st_size} {stat.st_mtime_ns}"
        content = file_sha256(path, DataError) if by_content else times
        digest.update(os.fsencode(path.relative_to(root).as_posix()))
        digest.update(f"\0{content}\0".encode())
    return f"{kind}, {len(paths)} files, {digest.hexdigest()[:16]}"


def _files(source: str) -> list[Path]:
    return _stdlib_files() if source == "stdlib" else _find(source).texts


def _root(source: str) -> Path:
    """The folder that the names of a source's files begin in."""
    if source == "stdlib":
        return _stdlib_root()
    path = Path(source)
    return path if path.is_dir() else path.parent


def _find(source: str) -> files.Found:
    """The files at a source that is a path. Raises `UserError`."""
    if not source or not os.path.lexists(source):  # Path("") is the current folder
        raise UserError(f"source {source!r}: no such file or folder; a source is {FORMS}")
    return files.find(Path(source))


# ---------------------------------------- the standard library


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> list[Path]:
    """The library's Python files without its tests, ordered by a hash: any prefix is a sample."""
    root = _stdlib_root()
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name)]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"source stdlib: no .py files under {root}; give a file or folder of text")

    def place(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()

    return sorted(paths, key=place)


def _stdlib_texts(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as file:  # decodes as PEP 263 says
            yield file.read()
    except (SyntaxError, UnicodeDecodeError):
        return  # a few files are test data in another encoding than they declare
