"""An extension of griffe, which reads the source for the documentation's site.

It turns the comment behind a dataclass's field into the field's docstring. `--help` shows these
comments too. mkdocs.yml names this file.
"""

import re
import tokenize
from io import StringIO
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Makes the comment behind a public field the docstring of a field that has none."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Reads the comment on the last line of a field's declaration.

        It does so for the fields of classes only, because constants of a module need no comment.
        """
        if attr.docstring or not attr.parent or not attr.parent.is_class or attr.endlineno is None:
            return
        tokens = list(tokenize.generate_tokens(StringIO(attr.source).readline))
        comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
        if comments:
            text = re.sub(r"([\\`*_\[\]<>])", r"\\\1", comments[-1])  # plain text, not Markdown
            attr.docstring = griffe.Docstring(text, parent=attr, lineno=attr.endlineno)
