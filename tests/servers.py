"""Servers that deployment tests start for themselves: PostgreSQL, and a receiver of notifications."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.data import missing

#: Where Debian keeps PostgreSQL's programs.
DEBIAN = "/usr/lib/postgresql"
#: httpx itself gives a server 5 s, which a busy machine does not keep.
http_get = partial(httpx.get, timeout=60)
http_post = partial(httpx.post, timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    true: Callable[[], Any], *, seconds: float, telling: Callable[[], str] = str, every: float = 0.25
) -> Any:
    """Wait until something is true, and return it; fail with what `telling` says."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, telling()
        time.sleep(every)
    return found


def started_by(process: int, words: str = "") -> list[psutil.Process]:
    """Find what a process has started, and what that has; those that live and have `words` in their command line."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if words in " ".join(child.cmdline()):
                found.append(child)
    return found


@contextmanager
def postgres() -> Iterator[str]:
    """Run a real PostgreSQL with an empty database, and give its URL."""
    places = [*sorted(Path(DEBIAN).glob("*/bin"), reverse=True), *map(Path, os.environ["PATH"].split(os.pathsep))]
    programs = next((place for place in places if (place / "initdb").exists()), None)
    if programs is None:
        missing("PostgreSQL is not installed")
    who: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses root
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    try:
        if who:
            shutil.chown(folder, **who)
        quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **who}
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "shoal", "-A", "trust", "--no-sync"], check=True, **quiet
        )
        port = free_port()  # not before initdb, which gives others seconds to take it
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", folder, "-p", str(port)]
        server = subprocess.Popen([programs / "postgres", "-D", folder / "data", *options], **quiet)
        try:
            create = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "shoal", "prefect"]
            wait_until(lambda: subprocess.run(create, check=False, **quiet).returncode == 0, seconds=120)
            yield f"postgresql://shoal@127.0.0.1:{port}/prefect"
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown
            server.wait(120)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def webhook() -> Iterator[tuple[str, list[str]]]:
    """Receive what is posted: the URL, and the bodies so far."""
    bodies: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"ok": True}).encode())

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
