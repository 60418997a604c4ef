"""The shell of the project's HTML pages: colours, light and dark, and data that no text can break
out of.

A page is one file that needs nothing else. Its parts are package data: NAME.html (the body),
NAME.css, and scripts, which find the data as `data` and the helpers of `shell.js`.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

from sngpt_jax.base.errors import UserError
from sngpt_jax.base.files import write_text_atomic


def _part(package: str, name: str) -> str:
    return importlib.resources.files(package).joinpath(name).read_text("utf-8")


def to_json(data: Any) -> str:
    """`data` as JSON in ASCII without `<`, `>` and `&`, so that no text in it can end the element
    it stands in, or begin one.

    Raises `ValueError` for NaN and infinities.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def render(
    package: str,
    name: str,
    title: str,
    data: Any,
    *,
    scripts: tuple[str, ...] = (),
    connect: bool = False,
) -> str:
    """The HTML page of `package`'s NAME.html, NAME.css and `scripts` (default: NAME.js), with
    `data` in it.

    The browser runs no other script than these, whose hashes stand in the page's policy, and loads
    nothing from anywhere; with `connect` the scripts may ask the server that the page came from.
    """
    script = "\n".join(
        [
            '"use strict";',
            _part(__package__, "shell.js"),
            *(_part(package, part) for part in scripts or (f"{name}.js",)),
        ]
    )
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    parts = {
        "policy": (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri"
            " 'none'" + ("; connect-src 'self'" if connect else "")
        ),
        # a file's name may be no text
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style": _part(__package__, "shell.css") + _part(package, f"{name}.css"),
        "body": _part(package, f"{name}.html"),
        "data": to_json(data),
        "script": script,
    }
    # in one pass: what is put in is not searched for further places
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part(__package__, "shell.html"))


def write(path: Path, page: str) -> None:
    """Writes the page to the file that `--out` names. Raises `UserError` where that cannot be
    written.
    """
    try:
        write_text_atomic(path, page)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot be written: {error.strerror}; give the path of a file"
        ) from None
