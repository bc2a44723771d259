"""A page in a headless Chromium, asked over two pipes in Chrome's DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = "chromium", "chromium-browser", "google-chrome"
FLAGS = (  # Root has no sandbox.
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
# Chromium reads what it is asked from 3, and writes what it found to 4.
AT_3_AND_4 = (
    "import fcntl, os, sys; "
    "high = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]; "
    "[os.dup2(n, i) for i, n in enumerate(high, 3)]; [os.close(n) for n in high]; "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def path() -> str | None:
    """Returns where Chromium is, if it is here."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page that is open: ``page.evaluate("document.title")``."""

    def __init__(self, asks: int, answers: int, seconds: float):
        self._asks, self._answers, self._seconds = asks, answers, seconds
        self._sent, self._rest = 0, b""
        self._session: dict[str, str] = {}
        self.version: str = self._call("Browser.getVersion")["product"]
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        found = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        self._call("Page.enable")

    def look(self, width: int, *, dark: bool = False) -> None:
        """Sets the width of the window, in CSS pixels, and the colours that a person prefers."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                   deviceScaleFactor=1, mobile=False)  # fmt: skip
        self._call("Emulation.setScrollbarsHidden", hidden=True)
        prefers = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[prefers])

    def open(self, url: str) -> None:
        """Goes to an address, and waits until it is loaded."""
        failed = self._call("Page.navigate", url=url).get("errorText")
        if failed:
            raise RuntimeError(f"Chromium can't open {url}: {failed}")
        self._next(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """Returns what an expression, or the promise that it is, comes to.

        Raises:
          RuntimeError: with what the page said.
        """
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        found = self._call("Runtime.evaluate", **asked)
        if "exceptionDetails" in found:
            raise RuntimeError(f"the page failed: {json.dumps(found['exceptionDetails'])}")
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """Saves the whole page as a PNG."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        found = self._call(
            "Page.captureScreenshot", captureBeyondViewport=True, clip=size | {"scale": 1}
        )
        file.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        self._session = {}
        self._call("Browser.close")

    def _call(self, method: str, **params: Any) -> Any:
        self._sent += 1
        asked = {"id": self._sent, "method": method, "params": params, **self._session}
        os.write(self._asks, json.dumps(asked).encode() + b"\0")
        answer = self._next(lambda message: message.get("id") == asked["id"])
        if "error" in answer:
            raise RuntimeError(f"Chromium can't do {method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self, wanted: Any) -> Any:
        """The next message that is wanted; others are passed over."""
        until = time.monotonic() + self._seconds
        while True:
            *messages, self._rest = self._rest.split(b"\0")
            for at, text in enumerate(messages):
                message = json.loads(text)
                if wanted(message):
                    self._rest = b"\0".join([*messages[at + 1 :], self._rest])
                    return message
            left = max(until - time.monotonic(), 0)
            if not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError(f"Chromium gave no answer within {self._seconds:g} s")
            read = os.read(self._answers, 1 << 20)
            if not read:
                raise RuntimeError("Chromium ended")
            self._rest += read


@contextmanager
def page(seconds: float = 120) -> Iterator[Page]:
    """An empty page of a new Chromium, which has so long for each answer.

    Raises:
      FileNotFoundError: where there is none.
    """
    program = path()
    if program is None:
        raise FileNotFoundError(f"no Chromium is here, by the names {', '.join(NAMES)}")
    (to_read, asks), (answers, to_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [sys.executable, "-c", AT_3_AND_4, str(to_read), str(to_write), program, *FLAGS,
             f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        try:
            found = Page(asks, answers, seconds)
            yield found
            found.close()
        finally:
            os.close(asks)
            os.close(answers)
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Without its pipes Chromium ends by itself; it is killed where it does not."""
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
