"""Which documents of a source are validation text, and which are training text."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import count, islice
from typing import Literal

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.corpus import USUAL, Reading, documents

Name = Literal["train", "val"]

DEFAULT_FRACTION = 0.1  # of one's own text; nanoGPT holds out as much of its first text
HUB_DOCUMENTS = 50_000  # of a Hugging Face data set, of which a fraction would be read to its end
_SEEK = 0.01  # share of a single document in which its cut looks for the end of a line


def draw(seed: int, number: int) -> float:
    """A number in [0, 1) that is drawn for document `number`, the same on every machine."""
    digest = blake2b(f"{seed} {number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def place_of_cut(text: str, held_out: float) -> int:
    """How many first characters of a document are for training: 1 to len(text) - 1, at the last end
    of a line before the held-out share if one is near.
    """
    place = min(max(1, round(len(text) * (1 - held_out))), len(text) - 1)
    line = text.rfind("\n", max(0, place - round(len(text) * _SEEK)), place) + 1
    return line or place


@dataclass(frozen=True)
class Split:
    """The rule that divides a source. Documents are numbered from 0 in the source's order."""

    source: str
    val_source: str = ""  # all of it is validation text, and all of `source` training text
    first: int = 0  # so many documents are held out from the start,
    below: float = 0.0  # or those whose `draw` is below this,
    seed: int = 0  # with this seed,
    cut: int = 0  # or the only document from this character on
    reading: Reading = USUAL

    def takes(self, name: Name, number: int) -> bool:
        """Whether document `number` belongs to the split `name`."""
        held_out = number < self.first or (self.below > 0 and draw(self.seed, number) < self.below)
        return held_out == (name == "val")

    @property
    def whole(self) -> bool:
        """Whether both splits are whole documents of one source."""
        return not (self.val_source or self.cut)

    def number(self, name: Name, place: int) -> int:
        """The number of the split's document at `place` (of 0, 1, …)."""
        if self.below and self.whole:
            return next(islice((n for n in count() if self.takes(name, n)), place, None))
        return place + self.first * (name == "train")

    def texts(self, name: Name, start: int = 0) -> Iterator[tuple[int, str]]:
        """Yields (number, text) of the split's documents from number `start` on."""
        own = self.val_source if name == "val" else ""
        texts: Iterator[tuple[int, str]] = enumerate(
            documents(own or self.source, reading=self.reading)
        )
        if self.cut:
            part = slice(self.cut) if name == "train" else slice(self.cut, None)
            texts = ((number, text[part]) for number, text in texts)
        if self.whole and name == "val" and self.first:  # the rest need not be read
            return islice(texts, start, self.first)
        texts = islice(texts, start, None)
        return ((n, t) for n, t in texts if self.takes(name, n)) if self.whole else texts


def choose(
    source: str,
    val_source: str,
    val_docs: int,
    val_fraction: float,
    split_seed: int,
    reading: Reading = USUAL,
) -> Split:
    """The rule for a source. Reads as many documents as it needs to know that both splits have one.
    Raises `UserError` if one has none.

    A `val_fraction` is the chance of each document. Of a single document it is the share at the
    end. At least one document is held out, and at least one is not.
    """
    texts, split = documents(source, reading=reading), partial(Split, source, reading=reading)
    if val_source and next(documents(val_source, reading=reading), None) is None:
        raise UserError(f"--val-source {val_source} holds no documents")
    if val_source or not val_fraction:
        held_out = sum(1 for _ in islice(texts, val_docs))
        if next(texts, None) is not None:
            return split(val_source, val_docs)
        if val_source or not held_out:
            raise UserError(f"--source {source} holds no documents")
        raise UserError(
            f"--source {source} holds {held_out} documents and --val-docs {val_docs} leaves none to"
            " train on; lower --val-docs, leave it out, or give --val-source"
        )
    lowest: list[float] = []  # two draws
    highest, only = 0.0, ""
    for number, text in enumerate(texts):
        drawn = draw(split_seed, number)
        lowest, highest = sorted((*lowest, drawn))[:2], max(highest, drawn)
        if lowest[0] < val_fraction <= highest:
            return split(below=val_fraction, seed=split_seed)
        only = text
    if len(lowest) > 1:  # all but the highest are held out, or the lowest alone
        below = highest if highest < val_fraction else lowest[1]
        return split(below=below, seed=split_seed)
    if len(only) < 2:
        raise UserError(f"--source {source} holds no documents to hold one out; give more text")
    return split(cut=place_of_cut(only, val_fraction))
