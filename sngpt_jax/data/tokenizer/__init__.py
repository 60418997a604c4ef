"""Text to tokens and back, and the bytes of text that tokens stand for.

There are two kinds: SentencePiece models (`.model`) and byte-level BPE in a `tokenizer.json`, such
as GPT-2's. `learn` learns one of the first kind.
"""

from pathlib import Path

from sngpt_jax.base import untrusted
from sngpt_jax.base.errors import UserError
from sngpt_jax.data.tokenizer.base import (
    MAX_VOCAB,
    NO_CORRECTIONS,
    ByteCounts,
    Document,
    TokenBytes,
    Tokenizer,
    corrected,
    counted,
    replace_surrogates,
)
from sngpt_jax.data.tokenizer.byte_level import ByteLevelTokenizer
from sngpt_jax.data.tokenizer.sentencepiece_model import SentencePieceTokenizer

__all__ = [
    "MAX_VOCAB",
    "NO_CORRECTIONS",
    "ByteCounts",
    "Document",
    "TokenBytes",
    "Tokenizer",
    "corrected",
    "counted",
    "load_tokenizer",
    "replace_surrogates",
]

# Texts of which every tokenizer keeps something: words, digits, lines, and other scripts.
PROBES = ("a", "The dog's 12 cats, 3.5 km away.\n\tx = y\n", "\u00e9", "\u65e5\u672c\u8a9e")

MAX_BYTES = 64 * 2**20  # of a tokenizer's file; GPT-2's has 2 MB


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a SentencePiece `.model` or a byte-level BPE `.json`.

    Raises `UserError` for a tokenizer that is not known to keep text, or that drops a probe text.
    """
    path = Path(path)
    kind = {".model": SentencePieceTokenizer, ".json": ByteLevelTokenizer}.get(path.suffix)
    if kind is None:
        expected = "a SentencePiece .model or a byte-level BPE tokenizer.json"
        raise UserError(f"{path}: not a tokenizer: expected {expected}")
    tokenizer = kind(path, untrusted.read_bytes(path, MAX_BYTES, UserError))
    for text in PROBES:
        document = tokenizer.encode_document(text)  # raises if its bytes do not add up
        if len(document.tokens) < 2:
            raise UserError(f"{path}: the tokenizer drops text: {text!a} encodes to no tokens")
    return tokenizer
