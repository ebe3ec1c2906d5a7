"""The basecall server of a node: started once for all workers of a run there, watched, and ended when the last is out.

Who holds the server is a process of its own, the keeper (`infra.dorado_keeper`), for workers come and go: each holds a
shared lock on a file for as long as it lives, however it dies; the keeper, which waits for that lock alone, ends the
server when the last one is gone. The kernel ends the server should the keeper die.

Files, in a folder of the node's that is named by run folder and user: `users.lock`, `start.lock` (who starts or mends),
`server.json` (where the server is; written when it is ready, removed when it ends).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from infra.processes import end, is_same
from infra.site import DoradoSite
from tasks.core.dorado import address_of, devices_of
from tasks.core.errors import EngineError
from tasks.engines.dorado_server import AttachedServer, Served, Server, model_set
from tasks.formats.workspace import read_json
from tasks.settings import EngineSettings

logger = logging.getLogger(__name__)

#: Seconds between looks at a server that starts.
LOOK_EVERY = 0.05
#: Seconds that a keeper is given to end its server.
GRACE = 15.0


def open_server(site: DoradoSite, settings: EngineSettings, *, out: Path, logs: Path) -> Server:
    """Return the server of this node; nothing is started before a client asks for it.

    Args:
        out: The run folder: runs do not share servers.
        logs: Folder for the server's output and its own logs.
    """
    if site.address:
        return AttachedServer(address_of(site.address))
    return SharedServer(
        server_command(site, settings, logs),
        folder=node_folder(out),
        log=logs / f"dorado_basecall_server.{socket.gethostname()}.log",
        start_within=site.start_within,
        restarts=site.restarts,
    )


def device_of(site: DoradoSite) -> str:
    """Return the devices that a server of ours is started on."""
    return site.device or devices_of(os.environ.get("CUDA_VISIBLE_DEVICES"))


def server_command(site: DoradoSite, settings: EngineSettings, logs: Path) -> tuple[str, ...]:
    """Return the command line that starts a server for these settings."""
    return (
        site.server,
        "--port",
        site.port,
        "--device",
        device_of(site),
        "--log_path",
        str(logs / f"dorado.{socket.gethostname()}"),
        *model_set(settings, site.models).server_arguments,
        *site.arguments,
    )


def node_folder(out: Path) -> Path:
    """Return the folder on this node in which the workers of a run find their server."""
    digest = hashlib.sha256(str(out).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}-{digest}"


def find_program(server: str) -> str:
    """Return the path of the server's program.

    Raises:
        EngineError: it is not there; says where it comes from.
    """
    found = shutil.which(server)
    if found is None:
        raise EngineError(
            f"there is no program {server!r} here; get ont-dorado-server from Oxford Nanopore and name "
            "dorado_basecall_server in the site (dorado.server), or the address of one that runs (dorado.address)"
        )
    return found


class SharedServer:
    """One worker's share in the server of its node."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        log: Path,
        start_within: float,
        restarts: int,
        back_off: float = 1.0,
    ) -> None:
        self._command = tuple(command)
        self._folder = folder
        self._log = log
        self._start_within = start_within
        self._restarts = restarts
        self._back_off = back_off
        self._mended = 0
        self._lock = threading.Lock()
        self._share: int | None = None
        self._served: Served | None = None
        self._never = threading.Event()

    def serve(self) -> Served:
        """Return where the server is; the first worker of a node starts it, the others wait for that."""
        with self._lock:
            if self._served is None:
                self._join()
                with self._alone():
                    state = self._running()
                    self._served = _served(state) if state else self._start(1 + self._last_generation())
            return self._served

    def mend(self, seen: Served, *, stalled: bool) -> Served:
        """Start the server again, unless another worker has, or it is alive and not stalled."""
        with self._lock:
            self._join()
            with self._alone():
                state = self._running()
                if state is not None:
                    now = _served(state)
                    if now.generation > seen.generation or not stalled:
                        self._served = now
                        return now
                    logger.warning("ending the basecall server at %s, which is stalled", seen.address)
                    _end_keeper(state)
                self._mended += 1
                if self._mended > self._restarts:
                    raise EngineError(
                        f"the basecall server died or stalled {self._mended} times; it is not started again more than "
                        f"{self._restarts} times (dorado.restarts in the site). The end of {self._log}:\n{self._tail()}"
                    )
                self._never.wait(min(self._back_off * 2 ** (self._mended - 1), 60.0))
                self._served = self._start(1 + max(seen.generation, self._last_generation()))
                return self._served

    def close(self) -> None:
        """Leave; the keeper ends the server when nobody is left."""
        with self._lock:
            if self._share is not None:
                os.close(self._share)
                self._share = None
            self._served = None

    def _join(self) -> None:
        """Take a share of the lock that tells the keeper that somebody is there; waits for one that is just ending."""
        if self._share is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._folder.stat().st_uid != os.getuid():
                raise EngineError(f"{self._folder} belongs to somebody else; remove it, or set another TMPDIR")
            self._share = os.open(self._folder / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._share, fcntl.LOCK_SH)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of whoever starts or mends."""
        with (self._folder / "start.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _running(self) -> dict[str, Any] | None:
        """Return what is known of the server; None when none runs."""
        state = _read_state(self._folder)
        return state if state and _keeper(state) else None

    def _last_generation(self) -> int:
        try:
            return int((self._folder / "generation").read_text())
        except (OSError, ValueError):
            return 0

    def _start(self, generation: int) -> Served:
        """Start a keeper with its server, and wait until that is ready. To be called alone."""
        find_program(self._command[0])
        (self._folder / "server.json").unlink(missing_ok=True)
        (self._folder / "generation").write_text(str(generation))
        logger.info("starting %s", " ".join(self._command))
        began = time.monotonic()
        with self._log.open("ab") as log:
            start = log.tell()
            keeper = subprocess.Popen(
                [sys.executable, "-m", "infra.dorado_keeper", self._folder, str(generation), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths())},
                start_new_session=True,
            )
        told = began
        while (state := _read_state(self._folder)) is None:
            waited = time.monotonic() - began
            if keeper.poll() is not None:
                raise EngineError(f"the basecall server ended as it started. {self._log} says:\n{self._tail(start)}")
            if waited > self._start_within:
                end(keeper, grace=GRACE)
                raise EngineError(
                    f"the basecall server was not ready in {self._start_within:g} s (dorado.start_within in the site); "
                    f"it may be measuring batch sizes on a GPU new to it. {self._log} says:\n{self._tail(start)}"
                )
            if time.monotonic() - told > 60:
                told = time.monotonic()
                logger.info("waiting for the basecall server for %.0f s; it may be measuring batch sizes", waited)
            self._never.wait(LOOK_EVERY)
        threading.Thread(target=keeper.wait, name="dorado-keeper", daemon=True).start()  # leaves no zombie
        logger.info("the basecall server is at %s after %.0f s", state["address"], time.monotonic() - began)
        return _served(state)

    def _tail(self, start: int = 0) -> str:
        """Return the last lines of the log."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(start, self._log.stat().st_size - 4000))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-12:])
        except OSError:
            return ""


def _paths() -> list[str]:
    """Return where Python finds our packages: a worker's working folder need not be ours."""
    return [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _read_state(folder: Path) -> dict[str, Any] | None:
    with suppress(json.JSONDecodeError):
        state: dict[str, Any] | None = read_json(folder / "server.json")
        return state
    return None


def _served(state: dict[str, Any]) -> Served:
    return Served(state["address"], state["generation"])


def _keeper(state: dict[str, Any]) -> psutil.Process | None:
    """Return the keeper when it and its server are alive; a process id alone may be another's by now."""
    try:
        keeper = psutil.Process(state["keeper"])
        server = psutil.Process(state["server"])
        alive = psutil.STATUS_ZOMBIE not in (keeper.status(), server.status())
    except psutil.NoSuchProcess:
        return None
    return keeper if alive and is_same(keeper.pid, state["keeper_since"]) else None


def _end_keeper(state: dict[str, Any]) -> None:
    """End a keeper and its server, and wait until they are gone."""
    keeper = _keeper(state)
    if keeper is None:
        return
    family = [keeper, *keeper.children(recursive=True)]
    with suppress(psutil.NoSuchProcess):
        keeper.terminate()
    _, left = psutil.wait_procs(family, timeout=GRACE)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE)
