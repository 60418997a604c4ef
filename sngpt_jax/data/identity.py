"""What scores call the data that they are of: a name for a person, and a hash that tells whether
two scores are of the same tokens.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from sngpt_jax.base.untrusted import file_sha256
from sngpt_jax.data.manifest import DataError
from sngpt_jax.data.shards import Dataset

_DIGITS = 12  # of a hash, hexadecimal


@dataclass(frozen=True)
class DataName:
    """The name and the short hash of data."""

    name: str
    hash: str

    def __str__(self) -> str:
        return f"{self.name} ({self.hash})"


def name_of(name: str, digests: Iterable[str]) -> DataName:
    """The name of data whose files have these hashes."""
    return DataName(name, hashlib.sha256("\n".join(digests).encode()).hexdigest()[:_DIGITS])


def validation_name(data: Dataset) -> DataName:
    """The name of a folder's validation text: the folder's own, and a hash of the SHA-256 of its
    validation shards, as the manifest states them or as they are.
    """
    if data.manifest:
        digests = [entry.sha256 for entry in data.manifest.val]
    else:
        digests = [file_sha256(shard.path, DataError) for shard in data.val.shards]
    return name_of(data.directory.absolute().name, digests)
