"""Documents that two texts have in common, by a hash of each document's tokens.

A document is what stands between two BOS tokens. Its hash is blake2b with 8 bytes of the tokens as
little-endian uint16. So documents of prepared folders, of published shards and of text that the
same tokenizer encodes can be compared. Documents without tokens do not count.
"""

import io
import logging
from hashlib import blake2b
from pathlib import Path

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import inside
from sngpt_jax.data.manifest import MANIFEST, DataError, HashesEntry, check_sha256, load_manifest
from sngpt_jax.data.shards import TOKEN, Dataset, TokenStream, open_dataset, open_npy, write_hashed
from sngpt_jax.data.split import Name
from sngpt_jax.data.tokenizer import MAX_VOCAB

logger = logging.getLogger("sngpt_jax")

HASH = np.dtype("<u8")
_BLOCK = 2**22  # tokens that are looked through at a time


def document_hash(tokens: np.ndarray) -> np.uint64:
    """The hash of a document's tokens, uint16 [n] without BOS."""
    digest = blake2b(np.ascontiguousarray(tokens, TOKEN).data, digest_size=HASH.itemsize).digest()
    return np.frombuffer(digest, HASH)[0]


def document_hashes(stream: TokenStream, bos_id: int) -> np.ndarray:
    """The hashes of the documents in one pass over the stream, in order: uint64 [N]."""
    digests, document, size = bytearray(), blake2b(digest_size=HASH.itemsize), 0
    for shard in stream.shards:
        for start in range(0, len(shard.tokens), _BLOCK):
            tokens = np.ascontiguousarray(shard.tokens[start : start + _BLOCK], TOKEN)
            content, begin = tokens.data, 0
            for end in (*np.flatnonzero(tokens == bos_id).tolist(), len(tokens)):
                document.update(content[begin:end])
                size += end - begin
                if end < len(tokens):  # a BOS ends the document before it
                    if size:
                        digests += document.digest()
                    document, size = blake2b(digest_size=HASH.itemsize), 0
                begin = end + 1
    if size:
        digests += document.digest()
    return np.frombuffer(bytes(digests), HASH)


def is_among(tokens: np.ndarray, known: np.ndarray) -> bool:
    """Whether a document of these tokens, without BOS, is among `known` sorted hashes."""
    if not len(tokens):
        return False
    found = document_hash(tokens)
    at = np.searchsorted(known, found)
    return bool(at < len(known) and known[at] == found)


def common(documents: np.ndarray, others: np.ndarray) -> int:
    """How many of the `documents` are among the `others`, both as hashes, uint64 [N]."""
    return int(np.isin(documents, others).sum())


def keep_hashes(directory: Path, split: Name, hashes: np.ndarray) -> HashesEntry:
    """Writes a split's hashes beside its shards."""
    file, name = io.BytesIO(), f"{split}.hashes.npy"
    np.save(file, hashes.astype(HASH), allow_pickle=False)
    return HashesEntry(name, write_hashed(directory / name, file.getvalue()))


def split_hashes(data: Dataset, split: Name) -> np.ndarray:
    """The hashes of a split: those that its preparation kept, or else computed from the shards.
    Raises `DataError` for a damaged file.
    """
    separation = data.manifest and data.manifest.separation
    if not separation:
        return document_hashes(getattr(data, split), data.tokenizer.bos_id)
    entry: HashesEntry = getattr(separation, split)
    path = inside(data.directory, entry.name, DataError)
    check_sha256(path, entry.sha256, "prepare the data again")
    return open_npy(path, HASH, "[n]")


def refuse_trained_text(
    hashes: np.ndarray, what: str, trained_in: Path, tokenizer_sha256: str
) -> None:
    """Raises `UserError` with the number of documents if `what`, whose documents have these
    `hashes`, has some in common with the training text of the folder `trained_in`.

    The documents must be the tokens of the given tokenizer. Logs a line where the training text
    cannot be opened, or is another tokenizer's.
    """
    unchecked = f"{what}: not compared with the training text of the model, because"
    logger.info(f"{what}: comparing its documents with the training text in {trained_in}")
    try:
        trained = open_dataset(trained_in, MAX_VOCAB)
    except DataError as error:
        logger.warning(f"{unchecked} {error if trained_in.is_dir() else f'{trained_in} is gone'}")
        return
    if trained.tokenizer.sha256 != tokenizer_sha256:
        logger.warning(f"{unchecked} {trained_in} has tokens of another tokenizer")
    elif found := common(hashes, split_hashes(trained, "train")):
        raise UserError(
            f"{what}: the model was trained on {found:,} of its {len(hashes):,} documents"
            f" ({trained_in}); score other text, or add --allow-overlap"
        )


def _trained_on_a_part(data: Dataset, trained_in: Path) -> bool:
    """Whether the two folders divide the only document of one source, so that no hashes agree, and
    the validation text begins before the training text ends.
    """
    if not data.manifest or not (trained_in / MANIFEST).is_file():
        return False
    try:
        origin, trained = data.manifest.origin, load_manifest(trained_in)
    except DataError:  # the comparison of hashes says so
        return False
    ours, theirs = (x.separation.cut if x.separation else 0 for x in (data.manifest, trained))
    begin = 0 if origin.val_source else ours
    same = trained.origin.source == (origin.val_source or origin.source)
    return same and bool(begin or theirs) and not 0 < theirs <= begin


def refuse_trained_data(data: Dataset, trained_in: Path) -> None:
    """`refuse_trained_text` for the validation split of a folder. The splits of the folder that the
    model was trained on were kept apart by its preparation.
    """
    if not (trained_in.is_dir() and trained_in.samefile(data.directory)):
        hashes, what = split_hashes(data, "val"), str(data.directory)
        if _trained_on_a_part(data, trained_in):
            raise UserError(
                f"{what}: the model was trained on a part of the same document ({trained_in});"
                " score other text, or add --allow-overlap"
            )
        refuse_trained_text(hashes, what, trained_in, data.tokenizer.sha256)
