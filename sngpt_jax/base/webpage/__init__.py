"""The shell of the project's HTML pages: colours, light and dark, and data that no text can leave.

Scripts find the data as `data`, and the helpers of `shell.js`.
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
    """`data` as ASCII JSON without `<`, `>` and `&`: its text can begin or end no element."""
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
    """The self-contained page of `package`'s NAME.html (the body), NAME.css and `scripts` (default:
    NAME.js), with `data`.

    Its policy names the scripts by their hash, so that the browser runs no other script and loads
    nothing. With `connect` the scripts may ask the server that the page came from.
    """
    sources = (_part(package, part) for part in scripts or (f"{name}.js",))
    script = "\n".join(['"use strict";', _part(__package__, "shell.js"), *sources])
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; script-src 'sha256-"
    parts = {
        "policy": f"{policy}{digest}'" + "; connect-src 'self'" * connect,
        # a file's name may not be text
        "title": html.escape(title.encode("utf-8", "replace").decode()),
        "style": _part(__package__, "shell.css") + _part(package, f"{name}.css"),
        "body": _part(package, f"{name}.html"),
        "data": to_json(data),
        "script": script,
    }
    # in one pass, so that inserted text is not searched again
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part(__package__, "shell.html"))
