"""Text to tokens and back, and how many bytes of text each token stands for.

Two kinds: SentencePiece models (`.model`; one can be trained here) and byte-level BPE in a
`tokenizer.json`, as GPT-2's. Bits per byte divide by the bytes of the text that the tokenizer's
normalizer gives, so each kind accounts for them exactly: a table by token (`TokenBytes`), and
corrections by position for the few tokens whose text the table cannot know
(`EncodedDocument.extra`).
"""

import abc
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import tokenizers

from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic

MAX_VOCAB = 65_536  # tokens are stored as uint16
MAX_BYTES = 64 * 2**20  # of a tokenizer's file; GPT-2's has 2 MB
# `train_sentencepiece` reads this much text for each entry of the vocabulary
TRAINING_CHARS_PER_TOKEN = 4096

_SPACE = "▁"  # U+2581, SentencePiece's sign for a space
_CHUNK_CHARS = 4096
_BOS_NAMES = ("<|endoftext|>", "<s>", "<|begin_of_text|>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which UTF-8 cannot encode; all other text as it
    is.
    """
    return _SURROGATE.sub("\ufffd", text)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of text by token: the challenge's rule, `base[y] + (leading_space[y] and not
    boundary[x])` for y after x.
    """

    base: np.ndarray  # int32 [V], bytes that the token always stands for
    # bool [V], the token also stands for a space, except after a boundary
    leading_space: np.ndarray
    boundary: np.ndarray  # bool [V], control, unknown and unused tokens, which stand for no text

    def count(self, previous: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Bytes, int64, of each of `tokens` after the token at the same place in `previous`; any
        one shape.
        """
        return (self.base[tokens] + (self.leading_space[tokens] & ~self.boundary[previous])).astype(
            np.int64
        )


@dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens and bytes: `bytes` = sum of `TokenBytes.count` over `tokens` + sum of
    `extra[:, 1]`.
    """

    tokens: np.ndarray  # int32 [N], BOS first
    bytes: int  # UTF-8 length of the normalized text
    # int64 [n, 2], rows (index into tokens, bytes to add to the table's count), indices ascending
    extra: np.ndarray


class Tokenizer(abc.ABC):
    """What the two kinds share. `str` arguments may hold anything; lone surrogates are read as
    U+FFFD.
    """

    def __init__(self, path: Path, data: bytes, vocab_size: int, bos_id: int):
        _check_vocab(path, vocab_size)
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = vocab_size
        self.bos_id = bos_id

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, int32 [N], without BOS."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; control tokens have none, and bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def normalize(self, text: str) -> str:
        """The text that the tokens of `text` stand for: what the normalizer gives, without a dummy
        prefix.
        """

    @abc.abstractmethod
    def token_bytes(self) -> TokenBytes:
        """The table of bytes by token."""

    def encode_document(self, text: str) -> EncodedDocument:
        """Encodes a whole document, BOS first, and accounts for its bytes."""
        tokens = np.concatenate([np.array([self.bos_id], np.int32), self.encode(text)])
        return EncodedDocument(
            tokens, len(self.normalize(text).encode()), self._extra(text, tokens)
        )

    def _extra(self, text: str, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((0, 2), np.int64)


def _check_vocab(path: Path, vocab_size: int) -> None:
    if vocab_size > MAX_VOCAB:
        raise UserError(
            f"{path}: a vocabulary of {vocab_size} tokens; shards hold 16-bit tokens, so use one of"
            f" at most {MAX_VOCAB}"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a SentencePiece `.model` or a byte-level BPE `.json`. Raises `UserError` for any other
    or damaged file.
    """
    path = Path(path)
    kind = {".model": SentencePieceTokenizer, ".json": ByteLevelTokenizer}.get(path.suffix)
    if kind is None:
        raise UserError(
            f"{path}: not a tokenizer: expected a SentencePiece .model or a byte-level BPE"
            " tokenizer.json"
        )
    return kind(path, untrusted.read_bytes(path, MAX_BYTES, UserError))


# ---------------------------------------------------------------------------------------------- SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Where the model keeps whitespace (no dummy prefix, runs of spaces kept) every ▁ is a real space
    and counts where it stands. Elsewhere the challenge's rule holds: a leading ▁ counts unless the
    token before is a boundary. SentencePiece itself reads a literal ▁ in the text as a space; a
    model that keeps whitespace and has byte tokens spells it in its three bytes here instead, so
    that encoding under identity normalization loses nothing.
    """

    def __init__(self, path: Path, data: bytes):
        sp = sentencepiece.SentencePieceProcessor()
        try:
            sp.LoadFromSerializedProto(data)
            sp.id_to_piece(list(range(sp.vocab_size())))  # each is text
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(f"{path}: not a SentencePiece model, or a damaged one") from None
        if sp.bos_id() < 0:
            raise UserError(
                f"{path}: the SentencePiece model has no BOS token; documents begin with one"
            )
        spaced = sp.normalize("a a")
        if _SPACE not in spaced or spaced.endswith(_SPACE):
            raise UserError(
                f"{path}: the SentencePiece model does not write a space as ▁ before the word, as"
                " the byte count needs"
            )
        super().__init__(path, data, sp.vocab_size(), sp.bos_id())
        self._sp = sp
        self._dummy_prefix = spaced.startswith(_SPACE)
        self._keeps_whitespace = (
            not self._dummy_prefix and sp.normalize(" a  a ").count(_SPACE) == 4
        )
        spelled = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._literal = spelled if self._keeps_whitespace and all(map(sp.is_byte, spelled)) else []

    def _parts(self, text: str) -> list[str]:
        text = replace_surrogates(text)
        return text.split(_SPACE) if self._literal else [text]

    def encode(self, text: str) -> np.ndarray:
        first, *rest = self._parts(text)
        ids = self._sp.encode(first)
        for part in rest:
            ids += self._literal + self._sp.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._sp.decode(np.asarray(ids, np.int64).tolist())

    def normalize(self, text: str) -> str:
        # joining with ▁ puts back the literal ones that `_parts` took out
        normalized = _SPACE.join(
            self._sp.normalize(part).replace(_SPACE, " ") for part in self._parts(text)
        )
        return normalized[1:] if self._dummy_prefix else normalized

    def token_bytes(self) -> TokenBytes:
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        base = np.zeros(self.vocab_size, np.int32)
        leading_space = np.zeros(self.vocab_size, bool)
        boundary = np.ones(self.vocab_size, bool)
        for i in range(self.vocab_size):
            if self._sp.is_control(i) or self._sp.is_unknown(i) or self._sp.is_unused(i):
                continue
            boundary[i] = False
            if self._sp.is_byte(i):
                base[i] = 1
                continue
            piece = self._sp.id_to_piece(i)
            leading_space[i] = piece.startswith(_SPACE) and not self._keeps_whitespace
            base[i] = _piece_bytes(piece) - int(leading_space[i])
        return TokenBytes(base, leading_space, boundary)

    def _extra(self, text: str, tokens: np.ndarray) -> np.ndarray:
        """What the table misses: the text of unknown tokens, and the space that leads the token
        after one or after BOS.
        """
        table = self._token_bytes
        real_space_first = (
            len(tokens) > 1 and table.leading_space[tokens[1]] and not self._dummy_prefix
        )
        if not (real_space_first or np.any(tokens == self._sp.unk_id())):
            return super()._extra(text, tokens)
        # an unknown token's piece is its normalized text
        pieces = self._sp.encode(replace_surrogates(text), out_type=str)
        by_token = zip(tokens[1:].tolist(), pieces, strict=True)
        found = np.array(
            [1 if self._sp.is_byte(i) else _piece_bytes(piece) for i, piece in by_token]
        )
        found[0] -= int(self._dummy_prefix)
        missed = found - table.count(tokens[:-1], tokens[1:])
        at = np.flatnonzero(missed)
        return np.stack([at + 1, missed[at]], axis=1).astype(np.int64)


def _piece_bytes(piece: str) -> int:
    return len(piece.replace(_SPACE, " ").encode())


def _training_chunks(documents: Iterable[str], chars: int) -> Iterator[str]:
    """The first `chars` characters of text in chunks. SentencePiece skips long lines whole, so it
    must not see any.
    """
    for text in documents:
        # its mark for unknown text: it skips what holds one
        text = replace_surrogates(text[:chars]).replace("\u2585", " ")
        yield from (
            text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS)
        )
        chars -= len(text)
        if chars <= 0:
            return


def train_sentencepiece(
    documents: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    normalization: Literal["nmt_nfkc", "identity"],
) -> Tokenizer:
    """Trains a SentencePiece BPE of exactly `vocab_size` tokens on the first 4096 · `vocab_size`
    characters, into `path`.

    The settings are the Parameter Golf challenge's (openai/parameter-golf,
    data/download_hf_docs_and_tokenize.py): character coverage 0.999, byte fallback, single digits,
    pad/bos/eos/unk = 0/1/2/3, no dummy prefix. `nmt_nfkc` also folds compatibility characters and
    all whitespace into single spaces. `identity` changes nothing and decodes to the very text: it
    learns runs of spaces, newlines and tabs, and pieces that mix letters and punctuation (2.67
    bytes a token at 1,024 tokens on Python source, against 1.62 with the challenge's own rules for
    pieces). The same text gives the same file.

    Raises `UserError` where the text is too little, or its characters too many, for `vocab_size`.
    """
    keep_everything: dict[str, Any] = {
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_by_unicode_script": False,
    }
    if vocab_size > MAX_VOCAB:
        raise UserError(
            f"a tokenizer of {vocab_size} tokens: shards hold 16-bit tokens; train one of at most"
            f" {MAX_VOCAB}"
        )
    chunks = list(_training_chunks(documents, TRAINING_CHARS_PER_TOKEN * vocab_size))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name=normalization,
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * _CHUNK_CHARS,  # bytes
            minloglevel=2,  # errors, which arrive as exceptions
            **(keep_everything if normalization == "identity" else {}),
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "no usable text"
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} tokens on {sum(map(len, chunks))} characters"
            f" of text: {reason.rstrip('.')}; give it more text or another vocabulary size"
        ) from None
    write_bytes_atomic(path, model.getvalue())
    return load_tokenizer(path)


# ---------------------------------------------------------------------------------------------- byte-level BPE


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the others from
    U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


class ByteLevelTokenizer(Tokenizer):
    """A byte-level BPE `tokenizer.json` (GPT-2 and its kin) through the `tokenizers` package.

    The text of a special token, such as `<|endoftext|>` written out in a document, is encoded as
    text, never as the token.
    """

    def __init__(self, path: Path, data: bytes):
        try:
            # the package makes a list of so many
            _check_vocab(path, _largest_id(typed_json.loads(data)) + 1)
            tok = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except UserError:
            raise
        except Exception as error:  # the package raises the bare class
            raise UserError(
                f"{path}: not a tokenizer.json, or a damaged one: {str(error)[:200]}"
            ) from None
        tok.encode_special_tokens = True
        tok.no_truncation()
        tok.no_padding()
        spec = json.loads(tok.to_str())
        problem = _byte_level_problem(tok, spec)
        if problem:
            raise UserError(
                f"{path}: not a byte-level BPE that spells every text exactly: {problem}"
            )
        special = {token["content"] for token in spec["added_tokens"] if token["special"]}
        bos = next((tok.token_to_id(name) for name in _BOS_NAMES if name in special), None)
        if bos is None:
            raise UserError(
                f"{path}: no special token to begin a document with; looked for"
                f" {', '.join(_BOS_NAMES)}"
            )
        vocab = tok.get_vocab(with_added_tokens=True)
        super().__init__(path, data, max(vocab.values()) + 1, bos)
        self._tok = tok
        self._text = [b""] * self.vocab_size  # of special tokens and of unused ids: none
        alphabet = _byte_alphabet()
        # written as they are, in no alphabet
        added = {token["content"] for token in spec["added_tokens"]}
        for piece, i in spec["model"]["vocab"].items():
            self._text[i] = b"" if piece in added else bytes(alphabet[c] for c in piece)
        for token in spec["added_tokens"]:
            self._text[token["id"]] = b"" if token["special"] else token["content"].encode()
        self._special = np.zeros(self.vocab_size, bool)
        self._special[[i for i, text in enumerate(self._text) if not text]] = True

    def encode(self, text: str) -> np.ndarray:
        return np.array(
            self._tok.encode(replace_surrogates(text), add_special_tokens=False).ids, np.int32
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return b"".join(self._text[i] for i in np.asarray(ids, np.int64).tolist()).decode(
            "utf-8", errors="replace"
        )

    def normalize(self, text: str) -> str:
        text = replace_surrogates(text)
        return self._tok.normalizer.normalize_str(text) if self._tok.normalizer else text

    def token_bytes(self) -> TokenBytes:
        base = np.array([len(text) for text in self._text], np.int32)
        return TokenBytes(base, np.zeros(self.vocab_size, bool), self._special)


def _largest_id(spec: Any) -> int:
    """Of the tokens that a `tokenizer.json` says it has, whatever else is in it; -1 where there
    are none.
    """
    holder = spec if isinstance(spec, dict) else {}
    model, added = holder.get("model"), holder.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += (
        [token.get("id") for token in added if isinstance(token, dict)]
        if isinstance(added, list)
        else []
    )
    return max((i for i in ids if isinstance(i, int)), default=-1)


def _byte_level_problem(tok: tokenizers.Tokenizer, spec: dict[str, Any]) -> str | None:
    """Why the tokens of a `tokenizer.json` do not stand for exactly the bytes of the normalized
    text; None where they do.
    """
    model, alphabet = spec["model"], _byte_alphabet()
    if model["type"] != "BPE":
        return f"its model is {model['type']}; expected BPE"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its model sets {key}"
    pre = spec["pre_tokenizer"] or {"type": "none"}
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return "its last pre-tokenizer is not ByteLevel without add_prefix_space"
    for step in steps[:-1]:
        if (
            step["type"] not in ("Split", "Digits", "Punctuation")
            or step.get("behavior") == "Removed"
        ):
            return f"its pre-tokenizer {step['type']} may change the text"
    missing = [byte for char, byte in alphabet.items() if char not in model["vocab"]]
    if missing:
        return f"it has no token for byte {min(missing):#04x}"
    added = {token["content"] for token in spec["added_tokens"]}
    strange = next(
        (
            piece
            for piece in model["vocab"]
            if piece not in added and not alphabet.keys() >= set(piece)
        ),
        None,
    )
    if strange is not None:
        return f"its token {strange!r} is not written in GPT-2's byte alphabet"
    for token in spec["added_tokens"]:
        content = token["content"]
        changed = tok.normalizer and not (
            token["normalized"] and tok.normalizer.normalize_str(content) == content
        )
        if not token["special"] and (token["lstrip"] or token["rstrip"] or changed):
            return (
                f"its added token {content!r} also takes in text around it or text not yet"
                " normalized"
            )
    return None
