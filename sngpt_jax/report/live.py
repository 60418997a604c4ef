"""A small server for this machine's browsers: it reads changed files when a browser asks."""

import contextlib
import datetime
import sys
import time
import urllib.parse
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from sngpt_jax.base import webpage
from sngpt_jax.base.errors import UserError
from sngpt_jax.report.page import page, report
from sngpt_jax.report.reading import RunData, read_run

# This machine's names in a request's Host. A site whose name resolves to this machine is refused.
NAMES = ("127.0.0.1", "localhost", "[::1]")

Signature = list[tuple[str, int, int]]


def now() -> str:
    """The time for a reader, with the time zone."""
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def signature(directory: Path) -> Signature:
    """Name, time and size of every file that `read_run` reads."""
    found = []
    for path in sorted(directory.glob("*.json*")):
        with contextlib.suppress(OSError):
            about = path.stat()
            found.append((path.name, about.st_mtime_ns, about.st_size))
    return found


class LiveRuns:
    """Run directories. Each is read again when one of its files has changed."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._lock = Lock()
        self._seen: dict[Path, Signature | None] = dict.fromkeys(directories)
        self._runs: dict[Path, RunData] = {}
        self._data: dict[str, Any] = {}

    def data(self) -> dict[str, Any]:
        """The data of the page from the present files. Raises `UserError` for unreadable ones."""
        with self._lock:
            for directory, seen in self._seen.items():
                if (found := signature(directory)) != seen:
                    self._runs[directory] = read_run(directory, may_be_empty=True)
                    self._seen[directory], self._data = found, {}
            if not self._data:
                runs = list(self._runs.values())
                self._data = report(runs, now(), live=str(time.time_ns()))
            return self._data


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a browser that has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def make_server(runs: LiveRuns, port: int) -> ThreadingHTTPServer:
    """The server, bound to `port` of the loopback address (0: any free port).

    Raises `UserError` if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def response(self) -> tuple[int, str, str]:
            path, _, query = self.path.partition("?")
            host = self.headers.get("Host", "")
            if host not in NAMES and host.rpartition(":")[0] not in NAMES:
                return 403, "text/plain", "this server answers requests to localhost"
            if path not in ("/", "/data.json"):
                return 404, "text/plain", "there is / and /data.json"
            try:
                data = runs.data()
            except UserError as error:
                return 503, "text/plain", str(error)
            if path == "/":
                return 200, "text/html", page(data)
            if urllib.parse.parse_qs(query).get("since") == [data["live"]]:
                return 204, "text/plain", ""
            return 200, "application/json", webpage.to_json(data)

        def do_GET(self) -> None:
            status, kind, text = self.response()
            content = text.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            if status != 204:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Logs nothing, because a page asks every three seconds."""

    try:
        return _Server(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UserError(
            f"--port {port}: cannot be listened on: {reason}; give another, or 0 for any free port"
        ) from None
