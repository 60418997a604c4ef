"""An extension of griffe, which reads the source for the site: the comment behind a dataclass's
field is its docstring.

`--help` shows the same comments. mkdocs.yml names this file.
"""

import re
import tokenize
from io import StringIO
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives each public field that has a comment behind it, and no docstring, that comment."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Reads the comment on the last line of the field's declaration, of a class alone: a
        module's constants need none.
        """
        if attr.docstring or not attr.parent or not attr.parent.is_class or attr.endlineno is None:
            return
        tokens = list(tokenize.generate_tokens(StringIO(attr.source).readline))
        comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
        if comments:
            text = re.sub(r"([\\`*_\[\]<>])", r"\\\1", comments[-1])  # plain text, not Markdown
            attr.docstring = griffe.Docstring(text, parent=attr, lineno=attr.endlineno)
