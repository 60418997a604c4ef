"""How documents are taken from text and from rows, and how large they may be."""

from dataclasses import dataclass
from typing import Any

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.untrusted import shown
from sngpt_jax.data.manifest import DataError

SEPARATOR = "<|endoftext|>"  # a line of a text file with only this text ends a document
TEXT_KEY = "text"

# Small files may unpack to more. A row is in memory as Python objects, which take up to 25 times
# its bytes.
MAX_DOCUMENT = 2**30  # bytes of a document in a text file, characters of one in a row
MAX_ROW = 2**26  # bytes of a line of JSON, of a .json file, of a row of .csv

_MAX_OPTION = 1000  # characters of an option


@dataclass(frozen=True)
class Reading:
    """How documents are taken from the files of a source. Raises `UserError` for a text that no
    file can hold.
    """

    text_key: str = TEXT_KEY  # key or column that holds a row's document
    split_on: str = ""  # what ends a document of a text file; empty: a line of `SEPARATOR`

    def __post_init__(self) -> None:
        for option, value in (("--text-key", self.text_key), ("--split-on", self.split_on)):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UserError(f"{option} {shown(value)}: expected text in UTF-8") from None
            if len(value) > _MAX_OPTION:
                most = f"expected at most {_MAX_OPTION} characters, found {len(value)}"
                raise UserError(f"{option} {shown(value)}: {most}")


USUAL = Reading()


def check_size(size: int, where: str) -> None:
    """Raises `DataError` for a document of more than `MAX_DOCUMENT`."""
    if size > MAX_DOCUMENT:
        most = f"a document of more than {MAX_DOCUMENT:,} bytes"
        raise DataError(f"{where}: {most}; divide it, with lines of {SEPARATOR} in a text file")


def listed(names: Any) -> str:
    """The first names of some, as an error shows them."""
    return ", ".join(map(shown, list(names)[:20])) or "(none)"


def text_of(row: Any, key: str, where: str) -> str:
    """The text under `key` of a row of any source that has rows. Raises `DataError`."""
    if isinstance(row, dict) and key in row:
        if isinstance(text := row[key], str):
            check_size(len(text), where)
            return text
        found = f"{type(text).__name__} there"
    elif isinstance(row, dict):
        found = f"the keys {listed(row)}; name one with --text-key"
    else:
        found = f"{type(row).__name__} in place of an object"
    raise DataError(f"{where}: expected a string under the key {shown(key)}, found {found}")
