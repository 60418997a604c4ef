"""What a folder of prepared tokens holds: `manifest.json`, and `progress.json` while it is being
made.

Both are read strictly: an unknown, missing or ill-typed key is an error, and a file name cannot
lead out of the folder.
"""

import dataclasses
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.base.untrusted import file_sha256, inside, problem_of_name, shown

T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"


class DataError(UserError):
    """Token data that is missing, damaged or of another make than asked for; names the file, what
    was expected and found.
    """


@dataclass(frozen=True)
class Origin:
    """What the folder is made from. Two preparations with equal origins write equal bytes."""

    source: str  # fingerprint of the text
    # fingerprint of the validation text; empty: it is the first val_docs documents of the source
    val_source: str
    val_docs: int
    tokenizer: str  # "train", or "sha256:" and the hash of the tokenizer file given
    vocab_size: int
    normalization: str  # of a learnt tokenizer; empty for a given one
    shard_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer file in the folder."""

    file: str
    sha256: str
    vocab_size: int
    bos_id: int


@dataclass(frozen=True)
class ExtraEntry:
    """A shard's sidecar of byte corrections: int64 [n, 2] in npy format, rows (token position in
    the shard, bytes).
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard."""

    name: str
    tokens: int
    documents: int  # that begin in this shard
    bytes: int  # UTF-8 bytes of the text that its tokens stand for
    sha256: str
    extra: ExtraEntry | None


@dataclass(frozen=True)
class Manifest:
    """A finished folder. Written last, so that a folder with a manifest is whole."""

    format: int
    origin: Origin
    tokenizer: TokenizerEntry
    train: tuple[ShardEntry, ...]
    val: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class SplitProgress:
    """How far one split has come: the next token to write is token `offset` of document
    `documents` of the split.
    """

    shards: tuple[ShardEntry, ...] = ()  # complete, in place
    documents: int = 0  # whole documents in those shards
    offset: int = 0  # tokens of the next document in those shards
    finished: bool = False


@dataclass(frozen=True)
class Progress:
    """An unfinished folder, from which a killed preparation goes on."""

    format: int
    origin: Origin
    tokenizer: TokenizerEntry | None = None  # None until its file is in place
    train: SplitProgress = SplitProgress()
    val: SplitProgress = SplitProgress()


# ---------------------------------------------------------------------------------------------- strict reading


def _check(name: str, value: Any, where: str) -> None:
    """What a field of that name may hold, beyond its type."""
    if type(value) is int and value < 0:
        raise DataError(f"{where}: expected a count of at least 0, found {value}")
    if name == "sha256" and not re.fullmatch("[0-9a-f]{64}", value):
        raise DataError(f"{where}: expected 64 hexadecimal digits, found {shown(value)}")
    if name in ("name", "file") and ("/" in value or problem_of_name(value)):
        raise DataError(f"{where}: expected a plain file name, found {shown(value)}")


def _load(kind: type[T], path: Path) -> T:
    values = typed_json.read(path, DataError)
    if isinstance(values, dict) and values.get("format") != FORMAT:
        raise DataError(
            f"{path}: expected format {FORMAT}, found {shown(values.get('format'))}; prepare the"
            " data again"
        )
    return typed_json.parse(kind, values, str(path), DataError, _check)


def load_manifest(directory: Path) -> Manifest:
    """Reads `directory`'s manifest. Raises `DataError` in one line."""
    path = directory / MANIFEST
    manifest = _load(Manifest, path)
    shards = (*manifest.val, *manifest.train)
    names = [
        manifest.tokenizer.file,
        *(s.name for s in shards),
        *(s.extra.name for s in shards if s.extra),
    ]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DataError(f"{path}: names {twice[0]} twice")
    return manifest


def load_progress(directory: Path) -> Progress:
    """Reads `directory`'s journal. Raises `DataError` in one line."""
    return _load(Progress, directory / PROGRESS)


def save(value: Manifest | Progress, directory: Path) -> None:
    """Writes a manifest or a journal into `directory`, atomically."""
    name = MANIFEST if isinstance(value, Manifest) else PROGRESS
    write_text_atomic(directory / name, json.dumps(dataclasses.asdict(value), indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- checksums


def verify(directory: str | Path) -> Manifest:
    """Compares the checksum of every file that `directory`'s manifest names. Raises `DataError` at
    the first that differs.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    expected = {manifest.tokenizer.file: manifest.tokenizer.sha256}
    for shard in (*manifest.val, *manifest.train):
        expected[shard.name] = shard.sha256
        if shard.extra:
            expected[shard.extra.name] = shard.extra.sha256
    for name, sha256 in expected.items():
        found = file_sha256(inside(directory, name, DataError), DataError)
        if found != sha256:
            raise DataError(
                f"{directory / name}: expected SHA-256 {sha256}, found {found}; prepare the data"
                " again"
            )
    return manifest
