"""The shell of the project's HTML pages: colours, light and dark, and data that no text can leave.

A page is one self-contained file. Its parts are package data: NAME.html (the body), NAME.css, and
scripts, which find the data as `data` and the helpers of `shell.js`.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any


def _part(package: str, name: str) -> str:
    return importlib.resources.files(package).joinpath(name).read_text("utf-8")


def to_json(data: Any) -> str:
    """`data` as ASCII JSON without `<`, `>` and `&`, so that its text cannot begin or end an
    element. Raises `ValueError` for NaN and infinities.
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
    `data`.

    The page's policy has the hash of these scripts, so that the browser runs no other script. It
    loads nothing. With `connect` the scripts may ask the server that the page came from.
    """
    sources = (_part(package, part) for part in scripts or (f"{name}.js",))
    script = "\n".join(['"use strict";', _part(__package__, "shell.js"), *sources])
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    parts = {
        "policy": (
            f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri"
            " 'none'" + ("; connect-src 'self'" if connect else "")
        ),
        # a file's name may not be text
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style": _part(__package__, "shell.css") + _part(package, f"{name}.css"),
        "body": _part(package, f"{name}.html"),
        "data": to_json(data),
        "script": script,
    }
    # in one pass, so that inserted text is not searched again
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part(__package__, "shell.html"))
