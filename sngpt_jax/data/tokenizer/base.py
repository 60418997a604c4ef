"""What both kinds of tokenizers share: encoding a document and counting the bytes of its text."""

import abc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.manifest import DataError, TokenizerEntry

MAX_VOCAB = 65_536  # tokens are stored as uint16

_SURROGATE = str.maketrans(dict.fromkeys(range(55296, 57344), "�"))
_EXCERPT = 12  # characters of an example after the first difference


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.translate(_SURROGATE)
    return text


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of text by token. By the challenge's rule, token y after token x stands for
    `base[y] + (leading_space[y] and not boundary[x])` bytes.
    """

    base: np.ndarray  # int32 [V], bytes that the token always stands for
    leading_space: np.ndarray  # bool [V], the token adds a space, except after a boundary
    boundary: np.ndarray  # bool [V], control, unknown and unused tokens, which stand for no text

    def count(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Bytes of each of `tokens` after the token at the same place in `previous`: int64."""
        space = self.leading_space[tokens] & ~self.boundary[previous]
        return (self.base[tokens] + space).astype(np.int64)


class ByteCounts(NamedTuple):
    """The UTF-8 bytes that a run of tokens stands for, by each rule, and documents."""

    golf: int  # as the challenge counts: of the text as the tokenizer normalized it
    text: int  # of the source text that the tokens keep
    source: int  # of the source text as it was read
    lossy: int  # documents that end here and that their tokens do not give back exactly


# A correction is a row of int64: the position of a token, and what to add there to the table's
# bytes (for documents: to 0) to get each of `ByteCounts`.
CORRECTION_COLUMNS = ("position", *ByteCounts._fields)
NO_CORRECTIONS = np.zeros((0, len(CORRECTION_COLUMNS)), np.int64)


def corrected(spelled: int, corrections: np.ndarray) -> ByteCounts:
    """The counts of tokens that stand for `spelled` bytes by the table alone."""
    golf, text, source, lossy = corrections[:, 1:].sum(axis=0).tolist()
    return ByteCounts(spelled + golf, spelled + text, spelled + source, lossy)


@dataclass(frozen=True)
class Document:
    """An encoded document."""

    tokens: np.ndarray  # uint16 [N], BOS first
    corrections: np.ndarray  # int64 [n, 5] of `CORRECTION_COLUMNS`, by ascending position
    bytes: ByteCounts
    example: str = ""  # of a lossy document: the place that changes, escaped

    @property
    def lossy(self) -> bool:
        """Whether the tokens do not give the document back exactly."""
        return self.bytes.lossy > 0


def counted(
    table: TokenBytes, tokens: np.ndarray, corrections: np.ndarray, example: str = ""
) -> Document:
    """The document of these tokens, whose bytes are the table's with the corrections. It keeps
    `example` if it is lossy.
    """
    spelled = int(table.count(tokens[:-1], tokens[1:]).sum())
    counts = corrected(spelled, corrections)
    return Document(tokens, corrections, counts, example if counts.lossy else "")


class Tokenizer(abc.ABC):
    """A tokenizer of either kind. Lone surrogates in text are read as U+FFFD."""

    def __init__(self, path: Path, data: bytes, vocab_size: int, bos_id: int):
        check_vocab(path, vocab_size)
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = vocab_size
        self.bos_id = bos_id

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, int32 [N], without BOS."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Control tokens have none; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> TokenBytes:
        """The table of bytes by token."""

    @property
    @abc.abstractmethod
    def _spellings(self) -> list[bytes]:
        """The bytes that each token spells [V]; control and unknown tokens spell none."""

    @cached_property
    def _spelled(self) -> np.ndarray:
        return np.array([len(text) for text in self._spellings], np.int64)

    def encode_document(self, text: str) -> Document:
        """The document `text` as tokens, with its bytes by every rule.

        Raises `DataError` unless the bytes of its tokens and its corrections add up to the bytes
        of its text.
        """
        text = replace_surrogates(text)
        source, ids = text.encode(), self.encode(text)
        tokens = np.concatenate([[self.bos_id], ids]).astype(np.uint16)
        spelled, kept = self._spell(ids)  # bytes by token, and the text that they spell
        unknown = self._unknown(text, ids)
        exact = kept == source
        table, wanted, size = self.token_bytes(), int(spelled.sum()), len(source)
        kept_size = size if exact else min(size, len(kept.decode(errors="ignore").encode()))
        truth = ByteCounts(wanted + int(unknown.sum()), kept_size, size, int(not exact))

        missing = spelled - table.count(tokens[:-1], tokens[1:])
        at = np.flatnonzero(missing | unknown)
        rows = np.zeros((len(at) + 1, len(CORRECTION_COLUMNS)), np.int64)
        rows[:-1, 0], rows[:-1, 1:4] = at + 1, missing[at, None]
        rows[:-1, 1] += unknown[at]
        # Nobody knows at which of its tokens a text lost the rest.
        rows[-1, 1:] = 0, kept_size - wanted, size - wanted, not exact
        if len(at) and at[-1] == len(ids) - 1:
            rows[-2, 1:] += rows[-1, 1:]
            rows = rows[:-1]
        elif rows[-1].any():
            rows[-1, 0] = len(ids)
        else:
            rows = rows[:-1]
        example = "" if exact else _example(text, kept.decode(errors="replace"))
        document = counted(table, tokens, rows, example)
        if document.bytes != truth:
            raise DataError(f"{self.path}: counts {document.bytes} for a text of {truth}")
        return document

    def entry(self) -> TokenizerEntry:
        """What a manifest says of the tokenizer."""
        return TokenizerEntry(self.path.name, self.sha256, self.vocab_size, self.bos_id)

    def _spell(self, ids: np.ndarray) -> tuple[np.ndarray, bytes]:
        """The bytes that each of `ids` spells in a document, int64 [N], and the text."""
        return self._spelled[ids], b"".join(map(self._spellings.__getitem__, ids.tolist()))

    def _unknown(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The bytes of normalized text behind each unknown token, int64 [N]."""
        return np.zeros(len(ids), np.int64)


def check_vocab(path: Path, vocab_size: int) -> None:
    """Raises `UserError` if the tokens of the tokenizer `path` do not fit into 16 bits."""
    if vocab_size > MAX_VOCAB:
        raise UserError(f"{path}: a vocabulary of {vocab_size} tokens; use at most {MAX_VOCAB}")


def _example(source: str, kept: str) -> str:
    """The first place where `kept` differs from `source`, with what follows, escaped."""
    low, high = 0, min(len(source), len(kept))
    while low < high:  # the length of the common beginning
        middle = (low + high + 1) // 2
        low, high = (middle, high) if source[:middle] == kept[:middle] else (low, middle - 1)
    start, stop = max(0, low - _EXCERPT), low + _EXCERPT
    return f"{source[start:stop]!a} became {kept[start:stop]!a}"
