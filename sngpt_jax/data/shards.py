"""Token shards on disk, read as one endless stream.

A shard has the challenge's published format: a header of 256 little-endian int32 (magic 20240520,
version 1, token count, zeros), then the tokens as little-endian uint16. nanoGPT's `train.bin` and
`val.bin` have no header.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.base.untrusted import inside, plain_size
from sngpt_jax.data.manifest import (
    MANIFEST,
    PROGRESS,
    DataError,
    Manifest,
    ShardEntry,
    check_sha256,
    explained,
    load_manifest,
    verify,
)
from sngpt_jax.data.tokenizer import TokenBytes, Tokenizer, load_tokenizer

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32

# This subfolder exists while published shards are being downloaded.
DOWNLOAD = ".download"

_COUNT_BLOCK = 2**20  # tokens whose bytes are counted at a time: counting takes 8 bytes per token
# Smaller data sets have their checksums verified whenever they are opened.
_VERIFIED_BYTES = 64 * 2**20


# ---------------------------------------- one file


def write_hashed(path: Path, content: bytes) -> str:
    """Writes `content` to `path` atomically; returns its SHA-256 in hexadecimal."""
    write_bytes_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Writes `tokens` (uint16 [N], 1 ≤ N < 2^31) as a shard, atomically; returns its SHA-256."""
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    return write_hashed(
        path, b"".join([header.data, tokens.astype(TOKEN, "C", "safe", copy=False).data])
    )


def open_shard(path: Path) -> np.memmap:
    """Maps a shard's tokens, uint16 [N]. Raises `DataError` unless magic, version and size fit."""
    size = plain_size(path, DataError)
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0")
    magic, version, count = np.frombuffer(header, "<i4", 3).tolist()
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if size < HEADER_BYTES:
        problem = f"expected a header of {HEADER_BYTES} bytes, found a file of {size}"
    elif magic != MAGIC:
        problem = f"not a token shard: expected magic {MAGIC}, found {magic}"
    elif version != VERSION:
        problem = f"expected shard version {VERSION}, found {version}"
    elif count < 1:
        problem = f"expected at least 1 token, found a count of {count}"
    elif size != expected:
        problem = "truncated" if size < expected else "oversized"
        problem += f": expected {expected} bytes for {count} tokens, found {size}"
    else:
        return np.memmap(path, TOKEN, "r", HEADER_BYTES, (count,))
    raise DataError(f"{path}: {problem}")


def open_headerless(path: Path) -> np.memmap:
    """Maps a file of uint16 tokens without a header (nanoGPT's form). Raises `DataError`."""
    size = plain_size(path, DataError)
    tokens = np.memmap(path, TOKEN, "r") if size and size % TOKEN.itemsize == 0 else None
    if tokens is None:
        problem = f"expected uint16 tokens, a multiple of 2 bytes, found {size} bytes"
    elif tokens[:2].tobytes() == MAGIC.to_bytes(4, "little"):
        problem = "expected tokens alone, found a shard header"
        problem += f"; name it *_{path.stem}_000000.bin instead"
    else:
        return tokens
    raise DataError(f"{path}: {problem}")


def open_extra(path: Path, tokens: int) -> np.ndarray:
    """Reads the byte corrections of a shard of `tokens` tokens: int64 [n, 2], positions ascending.
    Raises `DataError`.
    """
    with explained(lambda: f"{path}: cannot be read"):  # numpy raises many kinds of errors
        with open(path, "rb") as file:
            # Later versions may state a header of 4 GB, which numpy allocates.
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("expected version 1.0 of npy")
        # A mapped file must be as long as its header says. `np.load` would also take archives.
        rows = np.array(np.lib.format.open_memmap(path, mode="r"))
    if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 2:
        problem = f"int64 [n, 2], found {rows.dtype} {list(rows.shape)}"
    elif ((ends := np.concatenate([[-1], rows[:, 0], [tokens]]))[1:] <= ends[:-1]).any():
        problem = f"ascending token positions below {tokens}, found others"
    else:
        return rows
    raise DataError(f"{path}: expected {problem}")


# ---------------------------------------- a split as a stream

NO_EXTRA = np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Shard:
    """A mapped shard."""

    path: Path
    tokens: np.ndarray  # uint16 [N]
    # int64 [n, 2]: token position in the shard, bytes that the token's own length does not count
    extra: np.ndarray


@dataclass(frozen=True)
class TokenStream:
    """The shards of one split in order, as one sequence that starts again at its end. Threads may
    read it at the same time.
    """

    shards: tuple[Shard, ...]
    vocab_size: int

    def __post_init__(self) -> None:
        if not len(self):
            raise DataError("a stream of tokens needs at least one; found none")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard.tokens) for shard in self.shards)], dtype=np.int64)

    @cached_property
    def _extra(self) -> np.ndarray:
        rows = [
            shard.extra + np.array([start, 0])
            for shard, start in zip(self.shards, self._starts[:-1], strict=True)
        ]
        return np.concatenate([NO_EXTRA, *rows])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, start: int, count: int) -> np.ndarray:
        """Tokens start, …, start + count - 1 of the endless stream: uint16 [count].

        Position p is token p mod len(self). Raises `DataError` that names the file of a token
        outside the vocabulary.
        """
        result = np.empty(count, np.uint16)
        position, filled = start % len(self), 0
        index = int(np.searchsorted(self._starts, position, side="right")) - 1
        while filled < count:
            shard, offset = self.shards[index], position - int(self._starts[index])
            piece = shard.tokens[offset : offset + count - filled]
            if piece.max() >= self.vocab_size:
                at = offset + int(np.argmax(piece >= self.vocab_size))
                raise DataError(
                    f"{shard.path}: expected tokens below the vocabulary size {self.vocab_size},"
                    f" found {shard.tokens[at]} at token {at}; the shard was made with another"
                    " tokenizer or is damaged"
                )
            result[filled : filled + len(piece)] = piece
            filled += len(piece)
            index = (index + 1) % len(self.shards)
            position = int(self._starts[index])
        return result

    def extra(self, start: int, stop: int) -> np.ndarray:
        """Byte corrections of tokens [start, stop), stop ≤ len(self): int64 [n, 2] with rows
        (position in the stream, bytes).
        """
        first, last = np.searchsorted(self._extra[:, 0], [start, stop])
        return self._extra[first:last]

    def target_bytes(self, token_bytes: TokenBytes, start: int, stop: int) -> np.ndarray:
        """UTF-8 bytes of each token in [start, stop) after the token before it, corrections
        included: int64 [stop - start]. Needs 1 ≤ start ≤ stop ≤ len(self).
        """
        if not 1 <= start <= stop <= len(self):
            raise ValueError(f"target_bytes({start}, {stop}) in a stream of {len(self)} tokens")
        tokens = self.take(start - 1, stop - start + 1)
        result = np.array(token_bytes.count(tokens[:-1], tokens[1:]), np.int64)
        rows = self.extra(start, stop)
        result[rows[:, 0] - start] += rows[:, 1]
        return result

    def count_bytes(self, token_bytes: TokenBytes, start: int, stop: int) -> int:
        """The sum of `target_bytes` over [start, stop), counted in blocks to save memory."""
        return sum(
            int(self.target_bytes(token_bytes, block, min(block + _COUNT_BLOCK, stop)).sum())
            for block in range(start, stop, _COUNT_BLOCK)
        )


# ---------------------------------------- a folder


@dataclass(frozen=True)
class Dataset:
    """An opened folder of tokens."""

    directory: Path
    train: TokenStream
    val: TokenStream
    tokenizer: Tokenizer
    manifest: Manifest | None  # None for the published shards and for nanoGPT's files


def open_entries(directory: Path, entries: Sequence[ShardEntry]) -> list[Shard]:
    """Maps the shards that a manifest or journal names. Raises `DataError` for a missing file, a
    wrong header or a wrong size.
    """
    shards = []
    for entry in entries:
        path = inside(directory, entry.name, DataError)
        if not path.is_file():
            raise DataError(
                f"{path}: missing, though {MANIFEST} names it; restore it, or prepare the data"
                " again elsewhere"
            )
        tokens, extra = open_shard(path), NO_EXTRA
        if len(tokens) != entry.tokens:
            raise DataError(
                f"{path}: expected {entry.tokens} tokens as {MANIFEST} says, found {len(tokens)}"
            )
        if entry.extra:
            extra = open_extra(inside(directory, entry.extra.name, DataError), entry.tokens)
        shards.append(Shard(path, tokens, extra))
    return shards


def unfinished(directory: Path) -> bool:
    """Whether a preparation or download into this folder has begun and not ended."""
    return not (directory / MANIFEST).is_file() and (
        (directory / PROGRESS).is_file() or (directory / DOWNLOAD).is_dir()
    )


def _tokenizer_file(directory: Path) -> Path:
    found = sorted([*directory.glob("*.model"), *directory.glob("tokenizer.json")])
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{directory}: expected one tokenizer beside the shards (a .model or tokenizer.json),"
            f" found {names}"
        )
    return found[0]


def _open_shards(directory: Path, manifest: Manifest | None) -> tuple[list[Shard], list[Shard]]:
    """The train and val shards of a folder of any of the three kinds."""

    def mapped(paths: Iterable[Path], read: Callable[[Path], np.ndarray]) -> list[Shard]:
        return [Shard(path, read(path), NO_EXTRA) for path in sorted(paths)]

    train, val = (list(directory.glob(f"*_{split}_*.bin")) for split in ("train", "val"))
    plain = [directory / "train.bin", directory / "val.bin"]
    if manifest and manifest.train and manifest.val:
        return open_entries(directory, manifest.train), open_entries(directory, manifest.val)
    if manifest:
        problem = f"{MANIFEST} names no shards of {'val' if manifest.train else 'train'}"
    elif unfinished(directory):
        problem = (
            "its preparation has not finished; run the same prepare command again to resume it"
        )
    elif train and val:
        return mapped(train, open_shard), mapped(val, open_shard)
    elif all(path.is_file() for path in plain):
        return mapped(plain[:1], open_headerless), mapped(plain[1:], open_headerless)
    else:
        problem = (
            f"expected {MANIFEST}, shards named *_train_*.bin and *_val_*.bin, or train.bin and"
            " val.bin; found none"
        )
    raise DataError(f"{directory}: {problem}")


def open_dataset(directory: str | Path, vocab_size: int) -> Dataset:
    """Opens a folder of tokens for a model whose table has `vocab_size` rows. The folder's
    tokenizer may have fewer tokens. Raises `DataError` that names the file.

    A folder of `sngpt_jax.prepare` has a manifest. Without one, shards named `*_train_*.bin` and
    `*_val_*.bin` are read in the order of their names, else nanoGPT's `train.bin` and `val.bin`;
    one tokenizer file must lie beside them. The tokenizer's checksum and each shard's header and
    size are checked. The shards' checksums are checked only below 64 MiB of tokens, because larger
    sets take minutes; `prepare --verify` checks them all.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(
            f"{directory.absolute()}: no such folder; say where the data are (train: --data.dir"
            " DIR, evaluate: --data DIR), or make it with:"
            f" {cli.command('sngpt_jax.prepare', '--out', str(directory))} --source … --tokenizer …"
        )
    manifest = load_manifest(directory) if (directory / MANIFEST).is_file() else None
    train, val = _open_shards(directory, manifest)
    if manifest:
        path = inside(directory, manifest.tokenizer.file, DataError)
        remedy = "it is not the tokenizer that the shards were made with; restore that one"
        check_sha256(path, manifest.tokenizer.sha256, remedy)
    else:
        path = _tokenizer_file(directory)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{path}: expected at most model.vocab_size = {vocab_size} tokens, found"
            f" {tokenizer.vocab_size}"
        )
    if manifest and sum(shard.tokens.nbytes for shard in (*train, *val)) < _VERIFIED_BYTES:
        verify(directory)
    train_stream, val_stream = (
        TokenStream(tuple(split), tokenizer.vocab_size) for split in (train, val)
    )
    return Dataset(directory, train_stream, val_stream, tokenizer, manifest)
