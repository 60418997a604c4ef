"""Byte-level BPE in a `tokenizer.json`."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.manifest import explained
from sngpt_jax.data.tokenizer import tokenizer_json
from sngpt_jax.data.tokenizer.base import TokenBytes, Tokenizer, replace_surrogates

if TYPE_CHECKING:
    import tokenizers

_BOS_NAMES = ("<|endoftext|>", "<s>", "<|begin_of_text|>")


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

        handed = tokenizer_json.checked(path, data)
        with explained(lambda: f"{path}: not a tokenizer.json, or a damaged one"):
            tok = tokenizers.Tokenizer.from_str(handed)
        tok.encode_special_tokens = True
        spec = json.loads(tok.to_str())
        special = {x["content"]: x["id"] for x in spec["added_tokens"] if x["special"]}
        bos = next((special[name] for name in _BOS_NAMES if name in special), None)
        problem = _byte_level_problem(tok, spec, json.loads(handed))
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
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        base = self._spelled.astype(np.int32)
        return TokenBytes(base, np.zeros(self.vocab_size, bool), base == 0)

    @property
    def _spellings(self) -> list[bytes]:
        return self._text


def _added(spec: dict[str, Any]) -> set[str]:
    """The texts of the added tokens, special ones included."""
    return {token["content"] for token in spec["added_tokens"]}


def _byte_level_problem(
    tok: "tokenizers.Tokenizer", spec: dict[str, Any], handed: dict[str, Any]
) -> str | None:
    """Why a checked `tokenizer.json` does not spell normalized text exactly, or None."""
    model, alphabet = spec["model"], _byte_alphabet()
    if missing := [byte for char, byte in alphabet.items() if char not in model["vocab"]]:
        return f"it has no token for byte {min(missing):#04x}"
    handed_ids = {token["content"]: token["id"] for token in handed["added_tokens"]}
    if handed_ids != {token["content"]: token["id"] for token in spec["added_tokens"]}:
        return "the ids of its added tokens do not follow those of its model"
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
