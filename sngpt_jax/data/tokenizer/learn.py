"""Learns a SentencePiece BPE from documents."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_bytes_atomic
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from sngpt_jax.data.tokenizer.base import check_vocab, replace_surrogates

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
            **keep_everything,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "no usable text"
        what = f"a tokenizer of {vocab_size} tokens on {sum(map(len, chunks))} characters of text"
        problem = f"cannot train {what}: {reason.rstrip('.')}"
        raise UserError(f"{problem}; give more text or another vocabulary size") from None
    write_bytes_atomic(path, model.getvalue())
    return load_tokenizer(path)
