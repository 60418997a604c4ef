"""Learns a SentencePiece tokenizer from text."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.data.tokenizer import Tokenizer, check_vocab, load_tokenizer, replace_surrogates

TRAINING_CHARS_PER_TOKEN = 4096  # text that is read per vocabulary entry
_CHUNK_CHARS = 4096


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
    data/download_hf_docs_and_tokenize.py). `identity` also learns runs of whitespace, and pieces
    that mix letters and punctuation. Raises `UserError` for text that does not serve.
    """
    keep_everything: dict[str, Any] = {
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_by_unicode_script": False,
    }
    check_vocab(path, vocab_size)
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
