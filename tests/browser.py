"""A headless Chromium, driven over its DevTools protocol: open a page, wait for words, take a picture."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.data import program
from tests.servers import http_get, wait_until

#: Pictures go here; git ignores them, and people look at them.
SCREENSHOTS = Path(__file__).parents[1] / "screenshots"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--no-proxy-server",
    "--window-size=1500,1300",
    "--remote-debugging-port=0",
)


class Browser:
    """One tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._calls = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._calls += 1
        self._connection.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._connection.recv(timeout=300))
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        return str(self.value("document.body ? document.body.innerText : ''"))

    def wait_for(self, words: str, *, seconds: float = 300) -> str:
        """Wait until the page shows words, and return all that it shows."""
        wait_until(lambda: words in self.text(), seconds=seconds, telling=self.text)
        return self.text()

    def press(self, words: str) -> None:
        """Click on what says exactly these words."""
        find = f"""[...document.querySelectorAll('a,button,[role=tab],li,span')]
            .find(e => e.innerText && e.innerText.trim() === {json.dumps(words)})"""
        wait_until(lambda: self.value(f"!!{find}"), seconds=300, telling=self.text)
        where = self.value(
            f"(e => {{const r = e.getBoundingClientRect(); return [r.x + r.width/2, r.y + r.height/2]}})({find})"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, name: str) -> Path:
        """Take a picture of what the window shows."""
        SCREENSHOTS.mkdir(exist_ok=True)
        time.sleep(1)  # animations
        file = SCREENSHOTS / f"{name}.png"
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
        return file


@contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium with a profile of its own, and give a tab."""
    profile = tempfile.mkdtemp(prefix="chromium")
    process = subprocess.Popen(
        [program("chromium"), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told = Path(profile, "DevToolsActivePort")
        port = wait_until(lambda: told.exists() and told.read_text().split(), seconds=120)[0]

        def page() -> Any:
            found = http_get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
            return next((one["webSocketDebuggerUrl"] for one in found if one["type"] == "page"), None)

        with connect(wait_until(page, seconds=120), max_size=None, proxy=None) as connection:
            yield Browser(connection)
    finally:
        process.terminate()
        process.wait(120)
        shutil.rmtree(profile, ignore_errors=True)
