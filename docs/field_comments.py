"""An extension of griffe, which reads the source for the documentation's site.

It turns the comment beside or above a dataclass's field into the field's docstring. `--help` shows
these comments too. mkdocs.yml names this file.
"""

import re
import tokenize
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Makes the comment beside or above a public field the docstring of a field that has none."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Reads the comment on the last line of a field's declaration, or the one right above it.

        It does so for the fields of classes only, because constants of a module need no comment.
        """
        if attr.docstring or not attr.parent or not attr.parent.is_class or attr.endlineno is None:
            return
        comment = _beside(attr.source) or _above(attr)
        if comment:
            text = re.sub(r"([\\`*_\[\]<>])", r"\\\1", comment)  # plain text, not Markdown
            attr.docstring = griffe.Docstring(text, parent=attr, lineno=attr.endlineno)


def _beside(source: str) -> str:
    """The last comment inside a declaration, or an empty string."""
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return comments[-1] if comments else ""


def _above(attr: griffe.Attribute) -> str:
    """The whole-line comments that end right above a declaration, as one line."""
    assert attr.lineno is not None
    assert isinstance(attr.filepath, Path)
    before = attr.lines_collection[attr.filepath][: attr.lineno - 1]
    comments = takewhile(lambda line: line.lstrip().startswith("#"), reversed(before))
    return " ".join(line.strip().lstrip("# ") for line in reversed(list(comments)))
