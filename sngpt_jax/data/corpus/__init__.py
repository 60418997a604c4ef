"""Sources of text: the interpreter's own library, files, and Hugging Face."""

from sngpt_jax.data.corpus.hub import imported
from sngpt_jax.data.corpus.reading import USUAL, Reading
from sngpt_jax.data.corpus.sources import (
    as_path,
    check_reading,
    count_parts,
    documents,
    fingerprint,
    named_documents,
    say_left_out,
    text_bytes,
)

__all__ = [
    "USUAL",
    "Reading",
    "as_path",
    "check_reading",
    "count_parts",
    "documents",
    "fingerprint",
    "imported",
    "named_documents",
    "say_left_out",
    "text_bytes",
]
