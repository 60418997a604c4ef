"""SentencePiece models."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.tokenizer.base import TokenBytes, Tokenizer, replace_surrogates

_SPACE = "▁"  # U+2581, SentencePiece's sign for a space


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    If a model has no dummy prefix and keeps runs of spaces, each ▁ is a space and counts where it
    stands; otherwise the challenge's rule holds. Three byte tokens can spell ▁. If the model has a
    piece for a single space and keeps runs of spaces, they stand for a literal ▁, which
    SentencePiece would read as a space. If it has no such piece, they are its space.
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
        has_space = sp.piece_to_id(_SPACE) != sp.unk_id()
        spelled = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        spelled = spelled if all(map(sp.is_byte, spelled)) else []
        self._literal = spelled if self._keeps_whitespace and has_space else []
        self._space = [] if has_space else spelled

    def encode(self, text: str) -> np.ndarray:
        text = replace_surrogates(text)
        first, *rest = text.split(_SPACE) if self._literal else [text]
        ids = self._sp.encode(first)
        for part in rest:
            ids += self._literal + self._sp.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text: str = self._sp.decode(np.asarray(ids, np.int64).tolist())
        return text.replace(_SPACE, " ") if self._space else text

    def token_bytes(self) -> TokenBytes:
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        sp, size = self._sp, self.vocab_size
        boundary = np.array(
            [sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(size)]
        )
        leading_space = np.array([sp.id_to_piece(i).startswith(_SPACE) for i in range(size)])
        leading_space &= ~boundary & (not self._keeps_whitespace)
        return TokenBytes((self._spelled - leading_space).astype(np.int32), leading_space, boundary)

    @cached_property
    def _spellings(self) -> list[bytes]:
        sp = self._sp

        def spelling(i: int) -> bytes:
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                return b""
            piece = sp.id_to_piece(i)
            return bytes.fromhex(piece[3:5]) if sp.is_byte(i) else _text_of(piece)  # <0xE2>

        return [spelling(i) for i in range(self.vocab_size)]

    def _spell(self, ids: np.ndarray) -> tuple[np.ndarray, bytes]:
        spelled, text = super()._spell(ids)
        if self._space and _SPACE.encode() in text:
            first, second, third = self._space
            at = np.flatnonzero((ids[:-2] == first) & (ids[1:-1] == second) & (ids[2:] == third))
            spelled[at] = spelled[at + 1] = 0  # and the third token counts the space
            text = text.replace(_SPACE.encode(), b" ")
        if self._dummy_prefix and len(ids) and ids[0] != self._sp.unk_id():
            spelled[np.argmax(spelled > 0)] -= 1
            text = text[1:]
        return spelled, text

    def _unknown(self, text: str, ids: np.ndarray) -> np.ndarray:
        unknown = ids == self._sp.unk_id()
        found = np.zeros(len(ids), np.int64)
        if unknown.any():  # its piece is its normalized text
            pieces = self._sp.encode(text, out_type=str)
            found[unknown] = [len(_text_of(pieces[i])) for i in np.flatnonzero(unknown)]
            found[0] -= self._dummy_prefix and unknown[0]
        return found


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


def _text_of(piece: str) -> bytes:
    """The text that a piece spells, in UTF-8."""
    return piece.replace(_SPACE, " ").encode()
