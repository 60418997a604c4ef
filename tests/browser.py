"""A headless Chromium over its DevTools pipe: opens a page, moves the mouse, asks questions."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in")
DESKTOP, PHONE = (1280, 900), (390, 844)


class Browser:
    """One tab. `problems` holds the page's errors and warnings so far."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], 60)
            chunk = os.read(self._answers, 2**16) if ready else b""
            assert chunk, "the browser does not answer"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Log.entryAdded" | "Runtime.consoleAPICalled":
                self.problems.append(json.dumps(message["params"]))
        return message

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a DevTools command."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        command = {"id": self._number, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def open(self, url: str, size: tuple[int, int] = DESKTOP, theme: str = "light") -> None:
        """Loads a page in a window of `size` pixels for a light or dark `theme`."""
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=size == PHONE, **screen)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=url)
        there = f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})"
        deadline = time.monotonic() + 30
        while not self.ask(there):
            assert time.monotonic() < deadline, f"does not load: {url}"
            time.sleep(0.02)

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression, which is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event at a place of the window: mouseMoved, mousePressed, mouseReleased."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window (a phone lets innerWidth grow)."""
        page = "document.documentElement"
        return int(self.ask(f"{page}.scrollWidth - {page}.clientWidth"))


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """A browser with its files in `profile`, closed at the end."""
    assert CHROMIUM
    (commands_out, commands), (answers, answers_in) = os.pipe(), os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    flags.append(f"--user-data-dir={profile}")
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{commands_out} 4>&{answers_in}', "bash", CHROMIUM, *flags],
        pass_fds=(commands_out, answers_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
