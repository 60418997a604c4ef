"""Text to tokens and back, the bytes of normalized text that tokens stand for, and learning.

There are two kinds: SentencePiece models (`.model`) and byte-level BPE in a `tokenizer.json`, such
as GPT-2's. Both count bytes exactly: by a table, and by corrections for the few tokens whose text
the table cannot know.
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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import sentencepiece

from sngpt_jax.base import typed_json, untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.data.manifest import TokenizerEntry, explained

if TYPE_CHECKING:
    import tokenizers

MAX_VOCAB = 65_536  # tokens are stored as uint16
TRAINING_CHARS_PER_TOKEN = 4096  # text that is read per vocabulary entry
_CHUNK_CHARS = 4096
MAX_BYTES = 64 * 2**20  # of a tokenizer's file; GPT-2's has 2 MB

_SPACE = "▁"  # U+2581, SentencePiece's sign for a space
_BOS_NAMES = ("<|endoftext|>", "<s>", "<|begin_of_text|>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for every lone surrogate, which UTF-8 cannot encode."""
    return _SURROGATE.sub("\ufffd", text)


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


class Tokenizer(abc.ABC):
    """A tokenizer of either kind. Lone surrogates in text are read as U+FFFD."""

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
        """The text of `ids`. Control tokens have none; bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> TokenBytes:
        """The table of bytes by token."""

    def encode_document(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A document's tokens, uint16 [N], BOS first, and its corrections, int64 [n, 2]: ascending
        indices of tokens, and the bytes to add to the table's count there.
        """
        tokens = np.concatenate([[self.bos_id], self.encode(text)]).astype(np.uint16)
        return tokens, self._extra(text, tokens)

    def entry(self) -> TokenizerEntry:
        """What a manifest says of the tokenizer."""
        return TokenizerEntry(self.path.name, self.sha256, self.vocab_size, self.bos_id)

    def _extra(self, text: str, tokens: np.ndarray) -> np.ndarray:
        return np.zeros((0, 2), np.int64)


def _check_vocab(path: Path, vocab_size: int) -> None:
    """Raises `UserError` if the tokens of the tokenizer `path` do not fit into 16 bits."""
    if vocab_size > MAX_VOCAB:
        raise UserError(f"{path}: a vocabulary of {vocab_size} tokens; use at most {MAX_VOCAB}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a SentencePiece `.model` or a byte-level BPE `.json`. Raises `UserError`."""
    path = Path(path)
    kind = {".model": SentencePieceTokenizer, ".json": ByteLevelTokenizer}.get(path.suffix)
    if kind is None:
        expected = "a SentencePiece .model or a byte-level BPE tokenizer.json"
        raise UserError(f"{path}: not a tokenizer: expected {expected}")
    return kind(path, untrusted.read_bytes(path, MAX_BYTES, UserError))


# ---------------------------------------- SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    If a model has no dummy prefix and keeps runs of spaces, each ▁ is a space and counts where it
    stands; otherwise the challenge's rule holds. If the model also has byte tokens, a literal ▁ is
    spelled in its three bytes here, where SentencePiece reads a space.
    """

    def __init__(self, path: Path, data: bytes):
        sp = sentencepiece.SentencePieceProcessor()
        if problem := _sentencepiece_problem(sp, data):
            raise UserError(f"{path}: {problem}")
        super().__init__(path, data, sp.vocab_size(), sp.bos_id())
        self._sp = sp
        self._dummy_prefix = sp.normalize("a").startswith(_SPACE)
        spaces = sp.normalize(" a  a ").count(_SPACE)
        self._keeps_whitespace = not self._dummy_prefix and spaces == 4
        spelled = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._literal = spelled if self._keeps_whitespace and all(map(sp.is_byte, spelled)) else []

    def encode(self, text: str) -> np.ndarray:
        text = replace_surrogates(text)
        first, *rest = text.split(_SPACE) if self._literal else [text]
        ids = self._sp.encode(first)
        for part in rest:
            ids += self._literal + self._sp.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._sp.decode(np.asarray(ids, np.int64).tolist())

    def token_bytes(self) -> TokenBytes:
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        sp, size = self._sp, self.vocab_size
        base, leading_space = np.zeros(size, np.int32), np.zeros(size, bool)
        boundary = np.array(
            [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(size)]
        )
        for i in np.flatnonzero(~boundary).tolist():
            piece = sp.id_to_piece(i)
            leading_space[i] = piece.startswith(_SPACE) and not self._keeps_whitespace
            base[i] = 1 if sp.is_byte(i) else _piece_bytes(piece) - int(leading_space[i])
        return TokenBytes(base, leading_space, boundary)

    def _extra(self, text: str, tokens: np.ndarray) -> np.ndarray:
        """The text of unknown tokens, and the space that leads a token after one or after BOS."""
        table = self._token_bytes
        space_first = len(tokens) > 1 and table.leading_space[tokens[1]] and not self._dummy_prefix
        if not space_first and self._sp.unk_id() not in tokens:
            return super()._extra(text, tokens)
        # an unknown token's piece is its normalized text
        pieces = self._sp.encode(replace_surrogates(text), out_type=str)
        placed = zip(tokens[1:].tolist(), pieces, strict=True)
        found = np.array([1 if self._sp.is_byte(i) else _piece_bytes(piece) for i, piece in placed])
        found[0] -= int(self._dummy_prefix)
        missed = found - table.count(tokens[:-1], tokens[1:])
        at = np.flatnonzero(missed)
        return np.stack([at + 1, missed[at]], axis=1).astype(np.int64)


def _sentencepiece_problem(sp: sentencepiece.SentencePieceProcessor, data: bytes) -> str | None:
    """Loads the model `data` into `sp`; returns why it does not serve, or None."""
    try:
        sp.LoadFromSerializedProto(data)
        sp.id_to_piece(list(range(sp.vocab_size())))  # each piece is valid text
    except (RuntimeError, UnicodeDecodeError):
        return "not a SentencePiece model, or a damaged one"
    if sp.bos_id() < 0:
        return "the SentencePiece model has no BOS token"
    spaced = sp.normalize("a a")
    if _SPACE not in spaced or spaced.endswith(_SPACE):
        return "the SentencePiece model does not write a space as ▁ before the word"
    return None


def _piece_bytes(piece: str) -> int:
    """The UTF-8 bytes of text that a piece spells."""
    return len(piece.replace(_SPACE, " ").encode())


# ---------------------------------------- byte-level BPE


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, and characters
    from U+0100 on stand for the others, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = enumerate(byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in others}


class ByteLevelTokenizer(Tokenizer):
    """A byte-level BPE. The text of a special token in a document is encoded as plain text."""

    def __init__(self, path: Path, data: bytes):
        import tokenizers  # a large library that only this kind needs

        with explained(lambda: f"{path}: not a tokenizer.json, or a damaged one"):
            # The package makes a list of this length.
            _check_vocab(path, _largest_id(typed_json.loads(data)) + 1)
            tok = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        tok.encode_special_tokens = True
        tok.no_truncation()
        tok.no_padding()
        spec = json.loads(tok.to_str())
        special = {x["content"]: x["id"] for x in spec["added_tokens"] if x["special"]}
        bos = next((special[name] for name in _BOS_NAMES if name in special), None)
        problem = _byte_level_problem(tok, spec)
        if bos is None and not problem:
            problem = f"it has no token to begin a document; looked for {', '.join(_BOS_NAMES)}"
        if problem or bos is None:
            raise UserError(f"{path}: not a byte-level BPE that spells every text: {problem}")
        vocab_size = max(tok.get_vocab(with_added_tokens=True).values()) + 1
        super().__init__(path, data, vocab_size, bos)
        self._tok = tok
        self._text = [b""] * vocab_size  # special tokens and unused ids have no text
        alphabet, added = _byte_alphabet(), _added(spec)
        for piece, i in spec["model"]["vocab"].items():
            if piece not in added:
                self._text[i] = bytes(alphabet[c] for c in piece)
        for token in spec["added_tokens"]:  # spelled as they are, not in the alphabet
            self._text[token["id"]] = b"" if token["special"] else token["content"].encode()

    def encode(self, text: str) -> np.ndarray:
        encoded = self._tok.encode(replace_surrogates(text), add_special_tokens=False)
        return np.array(encoded.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = b"".join(self._text[i] for i in np.asarray(ids, np.int64).tolist())
        return text.decode("utf-8", errors="replace")

    def token_bytes(self) -> TokenBytes:
        base = np.array([len(text) for text in self._text], np.int32)
        return TokenBytes(base, np.zeros(self.vocab_size, bool), base == 0)


def _added(spec: dict[str, Any]) -> set[str]:
    """The texts of the added tokens, special ones included."""
    return {token["content"] for token in spec["added_tokens"]}


def _largest_id(spec: Any) -> int:
    """The largest token id in an unchecked `tokenizer.json`; -1 if it has none."""
    ids: list[Any] = []
    match spec:
        case {"model": {"vocab": dict(vocab)}}:
            ids += vocab.values()
    match spec:
        case {"added_tokens": [*added]}:
            ids += [token.get("id") for token in added if isinstance(token, dict)]
    return max((i for i in ids if isinstance(i, int)), default=-1)


def _byte_level_problem(tok: "tokenizers.Tokenizer", spec: dict[str, Any]) -> str | None:
    """Why a `tokenizer.json` does not spell exactly the bytes of normalized text, or None."""
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
        kind, known = step["type"], ("Split", "Digits", "Punctuation")
        if kind not in known or step.get("behavior") == "Removed":
            return f"its pre-tokenizer {kind} may change the text"
    if missing := [byte for char, byte in alphabet.items() if char not in model["vocab"]]:
        return f"it has no token for byte {min(missing):#04x}"
    added = _added(spec)
    for piece in model["vocab"]:
        if piece not in added and not alphabet.keys() >= set(piece):
            return f"its token {piece!r} is not written in GPT-2's byte alphabet"
    for token in spec["added_tokens"]:
        content = token["content"]
        changed = tok.normalizer and not (
            token["normalized"] and tok.normalizer.normalize_str(content) == content
        )
        if not token["special"] and (token["lstrip"] or token["rstrip"] or changed):
            return f"its added token {content!r} takes in text around it, or unnormalized text"
    return None


# ---------------------------------------- learning


def _training_chunks(documents: Iterable[str], chars: int) -> Iterator[str]:
    """The first `chars` characters in chunks: SentencePiece skips long lines."""
    for text in documents:
        # SentencePiece skips lines that hold its mark of unknown text, U+2585.
        text = replace_surrogates(text[:chars]).replace("\u2585", " ")
        for start in range(0, len(text), _CHUNK_CHARS):
            yield text[start : start + _CHUNK_CHARS]
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
    characters, and writes it to `path`. The same text gives the same file.

    The settings are those of the Parameter Golf challenge (openai/parameter-golf,
    data/download_hf_docs_and_tokenize.py). `nmt_nfkc` also folds compatibility characters and all
    whitespace into single spaces. `identity` changes nothing, and learns runs of whitespace and
    pieces that mix letters and punctuation. Raises `UserError` if the text is too little, or its
    characters too many, for `vocab_size`.
    """
    keep_everything: dict[str, Any] = {}
    if normalization == "identity":
        keep_everything["remove_extra_whitespaces"] = False
        keep_everything["allow_whitespace_only_pieces"] = True
        keep_everything["split_by_unicode_script"] = False
    _check_vocab(path, vocab_size)
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
            **keep_everything,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "no usable text"
        what = f"a tokenizer of {vocab_size} tokens on {sum(map(len, chunks))} characters of text"
        problem = f"cannot train {what}: {reason.rstrip('.')}"
        raise UserError(f"{problem}; give more text or another vocabulary size") from None
    write_bytes_atomic(path, model.getvalue())
    return load_tokenizer(path)
