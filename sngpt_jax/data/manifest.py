"""The files that describe a folder of tokens: `manifest.json`, or `progress.json` if unfinished."""

import contextlib
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sngpt_jax.base import typed_json
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_text_atomic
from sngpt_jax.base.untrusted import file_sha256, inside, problem_of_name, shown

T = TypeVar("T")

FORMAT = 2
READABLE = (1, FORMAT)  # formats of finished folders
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
CHANGED = "the tokenizer changed since the preparation began"


class DataError(UserError):
    """Token data that are missing, damaged or made otherwise than asked for. The message names the
    file, and what was expected and found.
    """


@contextlib.contextmanager
def explained(where: Callable[[], str]) -> Iterator[None]:
    """Turns what another package raises in the block into a `DataError` of one line that begins
    with `where()`.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{where()}: {type(error).__name__}: {reason}") from None


@dataclass(frozen=True)
class Origin:
    """What a folder is made from. Two preparations with equal origins write equal bytes."""

    source: str  # fingerprint of the text
    val_source: str  # fingerprint of the validation text; empty: the source's first val_docs
    val_docs: int  # held-out documents; 0 with a val_source
    tokenizer: str  # "train", or "sha256:" and the hash of the given tokenizer file
    vocab_size: int
    normalization: str  # of a learned tokenizer; empty for a given one
    shard_tokens: int  # of every shard but the last
    max_tokens: int  # of the training split; 0: no limit
    val_fraction: float = 0.0  # share of documents that is held out; 0: val_docs or val_source
    split_seed: int = 0  # of the documents that val_fraction holds out
    # training documents stay that validation has, too; None: of an earlier version, which kept them
    allow_overlap: bool | None = None
    text_key: str = "text"  # key or column with the text
    split_on: str = ""  # text that ends a document of a text file; empty: the usual line

    def differences(self, asked: Mapping[str, Any]) -> dict[str, str]:
        """A phrase for each field in which `asked` differs."""
        return {
            name: f"{name}: {old!r} there, {new!r} asked for"
            for name, new in asked.items()
            if (old := getattr(self, name)) != new and old is not None
        }


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer file in the folder."""

    file: str
    sha256: str  # hexadecimal, as everywhere
    vocab_size: int
    bos_id: int  # of the token that begins each document


@dataclass(frozen=True)
class ExtraEntry:
    """A shard's file of corrections in npy format: rows of int64, with the position of a token in
    the shard, and what to add there to the table's bytes to get each count of the shard. Folders
    of format 1 have one column of bytes.
    """

    name: str
    sha256: str


@dataclass(frozen=True)
class HashesEntry:
    """A split's file of document hashes (`sngpt_jax.data.overlap`): uint64 [n] in npy format."""

    name: str
    sha256: str


@dataclass(frozen=True)
class ShardEntry:
    """One shard."""

    name: str  # in the folder
    tokens: int
    documents: int  # that begin in this shard
    golf_bytes: int  # UTF-8 bytes that its tokens stand for as the challenge counts
    text_bytes: int | None  # of the source text that its tokens keep; None in format 1
    source_bytes: int | None  # of the source text as it was read
    lossy_documents: int | None  # that end in this shard and are not kept exactly
    sha256: str
    extra: ExtraEntry | None

    @property
    def files(self) -> list["ShardEntry | ExtraEntry"]:
        return [self, self.extra] if self.extra else [self]


def lost_share(shards: Iterable[ShardEntry]) -> float:
    """The share of the source's bytes that the tokens of `shards` do not keep."""
    sums = [(shard.source_bytes or 0, shard.text_bytes or 0) for shard in shards]
    source, kept = (sum(column) for column in zip(*sums, strict=True)) if sums else (0, 0)
    return 1 - kept / source if source else 0.0


@dataclass(frozen=True)
class Separation:
    """How the splits were kept apart."""

    dropped: int  # training documents left out, because validation has the same
    cut: int  # characters of the source's only document that are for training; 0: it has several
    train: HashesEntry
    val: HashesEntry


@dataclass(frozen=True)
class Manifest:
    """A complete folder, whose manifest is written last."""

    format: int
    origin: Origin
    tokenizer: TokenizerEntry
    train: tuple[ShardEntry, ...]
    val: tuple[ShardEntry, ...]
    separation: Separation | None = None  # None in a folder of an earlier version

    def checksums(self) -> list[tuple[str, str]]:
        """(name, SHA-256) of every file in the folder."""
        files = (file for shard in (*self.val, *self.train) for file in shard.files)
        tokenizer = self.tokenizer.file, self.tokenizer.sha256
        hashes = (self.separation.val, self.separation.train) if self.separation else ()
        return [tokenizer, *((file.name, file.sha256) for file in (*files, *hashes))]


@dataclass(frozen=True)
class SplitJournal:
    """How far one split is written: up to token `offset` of its document number `documents`."""

    shards: tuple[ShardEntry, ...] = ()  # complete and in place
    documents: int = 0  # whole ones in those shards
    offset: int = 0  # tokens of the next document in those shards
    finished: bool = False  # after the last shard
    dropped: int = 0  # documents before the next one which the split leaves out
    example: str = ""  # of a place in a document that its tokens do not keep, escaped

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.shards)


@dataclass(frozen=True)
class Journal:
    """An unfinished folder."""

    format: int
    origin: Origin
    tokenizer: TokenizerEntry | None = None  # None until its file is in place
    train: SplitJournal = SplitJournal()
    val: SplitJournal = SplitJournal()


# ---------------------------------------- strict reading


def _check(name: str, value: Any, where: str) -> None:
    """Refuses a value that a field `name` of the right type may not have."""
    if type(value) is int and value < 0:
        expected = "a count of at least 0"
    elif name == "sha256" and not re.fullmatch("[0-9a-f]{64}", value):
        expected = "64 hexadecimal digits"
    elif name in ("name", "file") and ("/" in value or problem_of_name(value)):
        expected = "a plain file name"
    else:
        return
    raise DataError(f"{where}: expected {expected}, found {shown(value)}")


def _load(kind: type[T], path: Path, formats: tuple[int, ...]) -> T:
    values = typed_json.read(path, DataError)
    if isinstance(values, dict) and values.get("format") not in formats:
        found = shown(values.get("format"))
        raise DataError(f"{path}: expected format {FORMAT}, found {found}; prepare the data again")
    if isinstance(values, dict) and values["format"] == 1:
        values = _upgraded(values)
    return typed_json.parse(kind, values, str(path), DataError, _check, defaulted=[])


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1, whose shards have one count of bytes, in today's fields."""

    def shard(old: Any) -> Any:
        if not isinstance(old, dict) or "bytes" not in old:
            return old
        unknown = dict.fromkeys(("text_bytes", "source_bytes", "lossy_documents"))
        return {name: x for name, x in old.items() if name != "bytes"} | {
            "golf_bytes": old["bytes"],
            **unknown,
        }

    splits = {name: values[name] for name in ("train", "val") if isinstance(values.get(name), list)}
    return values | {name: [*map(shard, split)] for name, split in splits.items()}


def load_manifest(directory: Path) -> Manifest:
    """`directory`'s manifest, read strictly. Raises `DataError`."""
    manifest = _load(Manifest, directory / MANIFEST, READABLE)
    name, count = Counter(name for name, _ in manifest.checksums()).most_common(1)[0]
    if count > 1:
        raise DataError(f"{directory / MANIFEST}: names {name} twice")
    return manifest


def load_journal(directory: Path) -> Journal:
    """`directory`'s journal, read strictly. Raises `DataError`."""
    return _load(Journal, directory / PROGRESS, (FORMAT,))


def save(value: Manifest | Journal, directory: Path) -> None:
    """Writes a manifest or a journal into `directory`."""
    name = MANIFEST if isinstance(value, Manifest) else PROGRESS
    write_text_atomic(directory / name, json.dumps(dataclasses.asdict(value), indent=1) + "\n")


# ---------------------------------------- checksums


def verify(directory: str | Path) -> Manifest:
    """Compares the checksum of every file that `directory`'s manifest names. Raises `DataError`."""
    directory = Path(directory)
    manifest = load_manifest(directory)
    for name, expected in manifest.checksums():
        check_sha256(inside(directory, name, DataError), expected, "prepare the data again")
    return manifest


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raises `DataError` with `remedy` unless the file `path` has the SHA-256 `expected`."""
    found = file_sha256(path, DataError) if path.is_file() else "no file"
    if found != expected:
        raise DataError(f"{path}: expected SHA-256 {expected}, found {found}; {remedy}")
