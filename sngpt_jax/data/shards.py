"""Token shards on disk, read as one endless stream.

A shard has the challenge's published format: a header of 256 little-endian int32 (magic 20240520,
version 1, token count, zeros), then the tokens as little-endian uint16.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sngpt_jax.base import cli
from sngpt_jax.base.files import visible, write_bytes_atomic
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
from sngpt_jax.data.tokenizer import (
    NO_CORRECTIONS,
    ByteCounts,
    TokenBytes,
    Tokenizer,
    corrected,
    load_tokenizer,
)

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32

DOWNLOAD = ".download"  # subfolder while published shards are being downloaded

_COUNT_BLOCK = 2**20  # tokens whose bytes are counted at a time, which takes 8 bytes per token
_VERIFIED_BYTES = 64 * 2**20  # smaller data sets are verified whenever they are opened


# ---------------------------------------- one file


def write_hashed(path: Path, content: bytes) -> str:
    """Writes `content` to `path`; returns its SHA-256 in hexadecimal."""
    write_bytes_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Writes `tokens` (uint16 [N], 1 ≤ N < 2^31) as a shard; returns its SHA-256."""
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    body = tokens.astype(TOKEN, "C", "safe", copy=False)
    return write_hashed(path, b"".join([header.data, body.data]))


def open_shard(path: Path) -> np.memmap:
    """Maps a shard's tokens, uint16 [N]. Raises `DataError`."""
    size = plain_size(path, DataError)
    with open(path, "rb") as file:
        header = file.read(12).ljust(12, b"\0")
    magic, version, count = np.frombuffer(header, "<i4").tolist()
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if (magic, version) != (MAGIC, VERSION):
        found = f"expected magic {MAGIC} and version {VERSION}, found {magic} and {version}"
        problem = f"not a token shard: {found}"
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
    if not size or size % TOKEN.itemsize:
        raise DataError(f"{path}: expected uint16 tokens, found {size} bytes")
    tokens = np.memmap(path, TOKEN, "r")
    if tokens[:2].tobytes() == MAGIC.to_bytes(4, "little"):
        name = f"*_{path.stem}_000000.bin"
        raise DataError(f"{path}: found a shard header; name the file {name}")
    return tokens


def open_npy(
    path: Path, dtype: np.typing.DTypeLike, axes: str, most: int | None = None
) -> np.ndarray:
    """Reads an array of `dtype` from an npy file: [n] or [n, 2] by its `axes`, with n ≤ `most`.
    Raises `DataError`.
    """
    plain_size(path, DataError)
    with explained(lambda: f"{path}: cannot be read"):  # numpy raises many kinds of errors
        with open(path, "rb") as file:
            # Later versions may state a header of 4 GB, which numpy allocates.
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("expected version 1.0 of npy")
        # A mapped file must be as long as its header says. `np.load` would also take archives.
        mapped = np.lib.format.open_memmap(path, mode="r")
    found = str(list(mapped.shape)).replace(f"[{len(mapped) if mapped.ndim else ''}", "[n", 1)
    if mapped.dtype != np.dtype(dtype) or found != axes:
        wanted = f"{np.dtype(dtype)} {axes}"
        raise DataError(f"{path}: expected {wanted}, found {mapped.dtype} {list(mapped.shape)}")
    if most is not None and len(mapped) > most:
        raise DataError(f"{path}: expected at most {most:,} rows, found {len(mapped):,}")
    return np.array(mapped)


def open_extra(path: Path, tokens: int, columns: int) -> np.ndarray:
    """Reads the corrections of a shard of `tokens` tokens, int64 [n, columns]. Raises
    `DataError`.
    """
    rows = open_npy(path, np.int64, f"[n, {columns}]", most=tokens)
    ends = np.concatenate([[-1], rows[:, 0], [tokens]])
    if (ends[1:] <= ends[:-1]).any():
        raise DataError(f"{path}: expected ascending token positions below {tokens}, found others")
    return rows


# ---------------------------------------- a split as a stream


@dataclass(frozen=True)
class Shard:
    """A mapped shard."""

    path: Path
    tokens: np.ndarray  # uint16 [N]
    extra: np.ndarray  # corrections, int64 [n, 5] of `CORRECTION_COLUMNS`, by ascending position


def moved(corrections: np.ndarray, by: int) -> np.ndarray:
    """The corrections with `by` added to their positions."""
    return np.concatenate([corrections[:, :1] + by, corrections[:, 1:]], axis=1)


@dataclass(frozen=True)
class TokenStream:
    """The shards of a split as one sequence that starts again at its end. Threads may share it."""

    shards: tuple[Shard, ...]
    vocab_size: int
    text_known: bool = True  # whether corrections hold the counts of the source text

    def __post_init__(self) -> None:
        if not len(self):
            raise DataError("a stream of tokens needs at least one; found none")

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard.tokens) for shard in self.shards)], dtype=np.int64)

    @cached_property
    def _extra(self) -> np.ndarray:
        placed = zip(self.shards, self._starts[:-1], strict=True)
        return np.concatenate([moved(shard.extra, start) for shard, start in placed])

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
                    f" found {shard.tokens[at]} at token {at}; it is damaged or another tokenizer's"
                )
            result[filled : filled + len(piece)] = piece
            filled += len(piece)
            index = (index + 1) % len(self.shards)
            position = int(self._starts[index])
        return result

    def extra(self, start: int, stop: int) -> np.ndarray:
        """Corrections of tokens [start, stop), stop ≤ len(self), by position in the stream."""
        first, last = np.searchsorted(self._extra[:, 0], [start, stop])
        return self._extra[first:last]

    def count_bytes(self, token_bytes: TokenBytes, start: int, stop: int) -> ByteCounts:
        """The counts of tokens [start, stop), each after the one before, with corrections. Needs
        1 ≤ start ≤ stop ≤ len(self).
        """
        total = 0
        for block in range(start, stop, _COUNT_BLOCK):
            tokens = self.take(block - 1, min(_COUNT_BLOCK, stop - block) + 1)
            total += int(token_bytes.count(tokens[:-1], tokens[1:]).sum())
        return corrected(total, self.extra(start, stop))


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
            remedy = "restore it, or prepare the data again elsewhere"
            raise DataError(f"{path}: missing, though {MANIFEST} names it; {remedy}")
        tokens, extra = open_shard(path), NO_CORRECTIONS
        if len(tokens) != entry.tokens:
            expected = f"expected {entry.tokens} tokens as {MANIFEST} says"
            raise DataError(f"{path}: {expected}, found {len(tokens)}")
        if entry.extra:
            file = inside(directory, entry.extra.name, DataError)
            columns = NO_CORRECTIONS.shape[1] if entry.text_bytes is not None else 2
            rows = open_extra(file, entry.tokens, columns)
            extra = np.zeros((len(rows), NO_CORRECTIONS.shape[1]), np.int64)
            extra[:, :columns] = rows  # format 1 has the challenge's count alone
        shards.append(Shard(path, tokens, extra))
    return shards


def unfinished(directory: Path) -> bool:
    """Whether a preparation or download into this folder has begun and not ended."""
    begun = (directory / PROGRESS).is_file() or (directory / DOWNLOAD).is_dir()
    return begun and not (directory / MANIFEST).is_file()


def _tokenizer_file(directory: Path) -> Path:
    """The one tokenizer of a folder without a manifest."""
    found = [*visible(directory, "*.model"), *visible(directory, "tokenizer.json")]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        expected = "expected one tokenizer (a .model or tokenizer.json) beside the shards"
        raise DataError(f"{directory}: {expected}, found {names}")
    return found[0]


def _open_shards(directory: Path, manifest: Manifest | None) -> tuple[list[Shard], list[Shard]]:
    """The train and val shards of a folder of any of the three kinds."""
    if manifest:
        if manifest.train and manifest.val:
            return open_entries(directory, manifest.train), open_entries(directory, manifest.val)
        missing = "val" if manifest.train else "train"
        raise DataError(f"{directory}: {MANIFEST} names no shards of {missing}")
    if unfinished(directory):
        again = "its preparation has not finished; run the same prepare command again"
        raise DataError(f"{directory}: {again}")
    for pattern, read in (("*_{}_*.bin", open_shard), ("{}.bin", open_headerless)):
        found = {split: visible(directory, pattern.format(split)) for split in ("train", "val")}
        if both := sorted({*found["train"]} & {*found["val"]}):
            names = "its name is that of a training and of a validation shard; rename it"
            raise DataError(f"{both[0]}: {names}")
        if all(found.values()):
            train, val = (
                [Shard(path, read(path), NO_CORRECTIONS) for path in found[split]]
                for split in found
            )
            return train, val
    expected = f"{MANIFEST}, shards named *_train_*.bin and *_val_*.bin, or train.bin and val.bin"
    raise DataError(f"{directory}: expected {expected}; found none")


def open_dataset(directory: str | Path, vocab_size: int) -> Dataset:
    """Opens a folder of tokens for a model whose table has `vocab_size` rows. The folder's
    tokenizer may have fewer tokens. Raises `DataError` that names the file.

    A folder without a manifest holds shards named `*_train_*.bin` and `*_val_*.bin`, or nanoGPT's
    headerless `train.bin` and `val.bin`; one tokenizer file must lie beside them. The tokenizer's
    checksum and each shard's header and size are checked. The shards' checksums are checked only
    below 64 MiB of tokens, because larger sets take minutes; `prepare --verify` checks them all.
    """
    directory = Path(directory)
    if not directory.is_dir():
        make = cli.command("sngpt_jax.prepare", "--out", str(directory))
        raise DataError(
            f"{directory.absolute()}: no such folder; say where the data are (train: --data.dir"
            f" DIR, evaluate: --data DIR), or make it with: {make} --source … --tokenizer …"
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
        expected = f"expected at most model.vocab_size = {vocab_size} tokens"
        raise DataError(f"{path}: {expected}, found {tokenizer.vocab_size}")
    if manifest and sum(shard.tokens.nbytes for shard in (*train, *val)) < _VERIFIED_BYTES:
        verify(directory)
    size = tokenizer.vocab_size
    known = manifest is not None and all(entry.text_bytes is not None for entry in manifest.val)
    train_stream, val_stream = (TokenStream(tuple(x), size, known) for x in (train, val))
    return Dataset(directory, train_stream, val_stream, tokenizer, manifest)
