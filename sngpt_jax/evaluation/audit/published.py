"""Byte counts and mistakes that the parameter-golf challenge (openai/parameter-golf) has published.

A number such as #1734 names a pull request there. The counts are for the challenge's validation
text, the first 50,000 documents of its FineWeb sample.
"""

from dataclasses import dataclass

REPORTED_TO = 5e-4  # the reported ratios are percentages with one or two digits behind the point


@dataclass(frozen=True)
class Count:
    """The bytes of text that the scored targets of a stream stand for."""

    what: str  # for a person
    tokens: int  # scored targets
    bytes: int
    stream: int = 0  # tokens of the whole stream; 0: unknown

    @property
    def per_token(self) -> float:
        return self.bytes / self.tokens


@dataclass(frozen=True)
class Mistake:
    """A wrong way to count bytes, and the range of its count divided by the right count."""

    name: str
    low: float
    high: float
    origin: str  # "recomputed", or where the ratio was reported


_TEXT = "the challenge's validation text with its tokenizer"
KNOWN = {
    "sp1024": Count(f"{_TEXT} sp1024", 62_021_632, 151_080_363, 62_021_846),
    "sp8192": Count(f"{_TEXT} sp8192", 40_540_160, 151_078_222),
    "sp8192-caseops": Count(
        "the challenge's validation text with sp8192 after CaseOps",
        47_851_520,
        151_074_499,
        47_853_344,
    ),
}

REPORTED = (
    Mistake(
        "the space before a word is counted twice",
        176_332_748 / 151_080_891,
        4_315_102 / 3_673_745,
        "as reported in #1719, #1734 and #1804 for sp8192",
    ),
    Mistake(
        "a token that is one byte counts the 3 bytes of U+FFFD, which stands for invalid bytes",
        157_319_833 / 151_073_604,
        157_319_833 / 151_073_604,
        "as reported in #1271 and #1289 for the tokenizer Scylla",
    ),
    Mistake(
        "the marks that a transform of the case puts into the text are counted",
        164_594_398 / 151_074_499,
        164_594_398 / 151_074_309,
        "as reported in #2071 and #2138 for CaseOps",
    ),
)
