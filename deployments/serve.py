"""One process for a workstation: Prefect server with its UI, a worker, the deployments, the watch's schedule.

It starts what dies, and ends all of it when it is stopped. Everything listens on loopback unless told otherwise, and
asks for a password that is made at the first start.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from tempfile import NamedTemporaryFile

import psutil

from deployments.install import POOL
from infra.prefect_server import CLIENT_SETTINGS, SERVER_SETTINGS, answers
from infra.processes import end, spawn
from tasks.core.errors import SettingsError
from tasks.settings import CONFINED_TO

logger = logging.getLogger(__name__)

#: Seconds between looks at the children, and without an answer after which a server counts as dead.
LOOK_EVERY = 1.0
DEAF_FOR = 120.0
#: Seconds that flow runs get to end when we are stopped.
GRACE = 30.0
#: Restarts wait 1, 2, 4, … seconds, at most this long; a child that lived this long starts at 1 again.
MOST_PATIENCE = 60.0
#: Of the automations: how often a flow run says that it lives, seconds; 30 is the least that Prefect takes.
HEARTBEAT = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a workstation's server keeps its own."""

    folder: Path

    @property
    def auth(self) -> Path:
        """User and password of the API, as `user:password`; readable by the owner only."""
        return self.folder / "auth"

    @property
    def prefect(self) -> Path:
        return self.folder / "prefect"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def lock(self) -> Path:
        return self.logs / "lock"

    def create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs.mkdir(exist_ok=True)


def password(file: Path) -> str:
    """Return `user:password` from a file; make both at the first call.

    Raises:
        SettingsError: others may read the file, or it holds none.
    """
    if not file.exists():
        with NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.") as made:  # readable by the owner only
            made.write(f"shoal:{secrets.token_urlsafe(24)}\n")
            made.flush()
            with suppress(FileExistsError):
                os.link(made.name, file)  # the file is never there without its password
    if file.stat().st_mode & 0o077:
        raise SettingsError(f"{file} holds a password, and others may read it; chmod 600 {file}")
    word = file.read_text().strip()
    if not all(word.partition(":")):
        raise SettingsError(f"{file} should hold user:password; write that, or remove it, and a password is made")
    return word


def environment(
    home: Home, *, host: str, port: int, database: str | None, auth: str | None, site: str | None = None
) -> dict[str, str]:
    """Return the environment of server, worker and flows.

    Args:
        database: `postgresql://user:password@host/name`; None: SQLite in the home.
        auth: `user:password`; None: whoever reaches the port may do everything.
        site: Whose roots confine the paths of all runs; None: each run's own site's.
    """
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    if ":" in reached:
        reached = f"[{reached}]"
    values = {
        **SERVER_SETTINGS,
        **CLIENT_SETTINGS,
        "PREFECT_HOME": str(home.prefect),
        "PREFECT_API_URL": f"http://{reached}:{port}/api",
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
        # Relative: the browser asks the server that it has the page from, also through a tunnel or proxy.
        "PREFECT_UI_API_URL": "/api",
        "PYTHONSAFEPATH": "1",
    }
    if auth:
        values |= {"PREFECT_SERVER_API_AUTH_STRING": auth, "PREFECT_API_AUTH_STRING": auth}
    if site:
        values[CONFINED_TO] = site
    if database:
        values["PREFECT_API_DATABASE_CONNECTION_URL"] = database_url(database)
    return values


def database_url(given: str) -> str:
    """Return a database's address as Prefect wants it, with the driver's name.

    Raises:
        SettingsError: it is not PostgreSQL's.
    """
    for scheme in ("postgresql://", "postgres://", "postgresql+asyncpg://"):
        if given.startswith(scheme):
            return "postgresql+asyncpg://" + given.removeprefix(scheme)
    shown = given.split("://", 1)[0]  # the rest may hold a password
    raise SettingsError(f"database: {shown!r} is not known; give postgresql://user:password@host/name")


def refuse_taken(host: str, port: int) -> None:
    """Refuse an address that can't be listened on: who answers there already is not ours to change.

    Raises:
        SettingsError: names the port, or the address.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:  # as Prefect's server does it
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"port {port} is taken; give another with --port") from error
        raise SettingsError(
            f"{host!r}, port {port}, can't be listened on: {error.strerror}; give others with --host and --port"
        ) from error


@dataclass(slots=True, kw_only=True)
class Child:
    """A program that is to run for as long as we do."""

    name: str
    command: list[str]
    log: Path
    process: Popen[bytes] | None = None
    #: Seconds of the monotonic clock: when it was started, and when it may be started again.
    started: float = 0.0
    again_at: float = 0.0
    patience: float = 1.0
    #: Seconds that it gets to end by itself.
    grace: float = 10.0

    def start(self, now: float, environment: Mapping[str, str]) -> None:
        self.process = spawn(self.command, log=self.log, environment=environment)
        self.started = now

    def end(self) -> None:
        if self.process is not None:
            end(self.process, grace=self.grace)
            self.process = None

    def listens(self, port: int) -> bool:
        """Tell whether it is this program that is reached on a port."""
        try:
            found = psutil.Process(self.process.pid).net_connections("tcp") if self.process else ()
        except psutil.Error:  # it has ended
            return False
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in found)

    def died(self, now: float) -> bool:
        """Note that the program has ended by itself, and when to start it again."""
        if self.process is None or self.process.poll() is None:
            return False
        self.end()  # who is left of its group
        self.patience = 1.0 if now - self.started > MOST_PATIENCE else min(2 * self.patience, MOST_PATIENCE)
        self.again_at = now + self.patience
        return True


def serve(
    home: Home,
    values: Mapping[str, str],
    *,
    prepare: Callable[[], None],
    announce: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Run server and worker until `stop` is set.

    Args:
        values: Environment of the children.
        prepare: Called when the server answers for the first time, before the worker starts.

    Raises:
        SettingsError: another program has the port.
    """
    python = [sys.executable, "-m", "prefect"]
    host, port, url = values["PREFECT_SERVER_API_HOST"], values["PREFECT_SERVER_API_PORT"], values["PREFECT_API_URL"]
    refuse_taken(host, int(port))
    given = {**os.environ, **values}
    server = Child(
        name="server",
        command=[*python, "server", "start", "--host", host, "--port", port],
        log=home.logs / "server.log",
    )
    worker = Child(
        name="worker",
        command=[*python, "worker", "start", "--pool", POOL, "--type", "process"],
        log=home.logs / "worker.log",
        grace=GRACE,
    )
    prepared = False
    heard = time.monotonic()
    with ExitStack() as stack:
        stack.callback(server.end)
        stack.callback(worker.end)
        server.start(heard, given)
        while not stop.wait(LOOK_EVERY):
            now = time.monotonic()
            for child in (server, worker):
                if child.died(now):
                    announce(f"the {child.name} has died; it is started again in {child.patience:.0f} s ({child.log})")
                if child.process is None and now >= child.again_at and (child is server or prepared):
                    child.start(now, given)
            if answers(url):
                heard = now
                if not prepared and server.listens(int(port)):  # another may have taken the port since
                    prepare()
                    prepared = True
            elif server.process and now - max(heard, server.started) > DEAF_FOR:
                announce(f"the server has not answered for {DEAF_FOR:.0f} s; it is started again ({server.log})")
                server.end()
