"""The basecall server of a machine or Slurm job: started once for all workers of a run there, watched, and ended.

Who holds the server is a process of its own, the keeper (`infra.dorado_keeper`), for workers come and go: each holds a
share of a folder on the machine (`infra.node_folder`), and the keeper ends the server when the last one is gone. The
kernel ends the server should the keeper die.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from infra import ports
from infra.node_folder import join, keeper_of, living, node_folder, remove_unused, sweep, told_in
from infra.processes import began, end
from infra.site import DoradoSite
from tasks.core.dorado import address_of, devices_of, log_suffix, server_name
from tasks.core.errors import EngineError
from tasks.engines.dorado_server import AttachedServer, Served, Server, model_set
from tasks.formats.workspace import write_json
from tasks.settings import EngineSettings

logger = logging.getLogger(__name__)

#: Seconds between looks at a server that starts.
LOOK_EVERY = 0.05
#: Seconds that a keeper is given to end its server.
GRACE = 15.0


def open_server(site: DoradoSite, settings: EngineSettings, *, out: Path, logs: Path) -> Server:
    """Return the server of this machine or job; nothing is started before a client asks for it.

    Args:
        out: The run folder: runs do not share servers.
        logs: Folder for the server's output and its own logs.
    """
    if site.address:
        return AttachedServer(address_of(site.address))
    return SharedServer(
        server_command(site, settings, logs),
        folder=shared_folder(site, out),
        log=logs / f"dorado_basecall_server.{log_suffix(socket.gethostname(), os.environ)}.log",
        port=site.port,
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
        str(logs / f"dorado.{log_suffix(socket.gethostname(), os.environ)}"),
        *model_set(settings, site.models).server_arguments,
        *site.arguments,
    )


def shared_folder(site: DoradoSite, out: Path) -> Path:
    """Return the folder on this machine in which the workers of a run find the server that they share."""
    started_as = (site.server, site.port, device_of(site), str(site.models), *site.arguments)
    return node_folder(server_name(run=str(out), environment=os.environ, started_as=started_as))


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
    """One worker's share in the server of its machine or job."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        log: Path,
        start_within: float,
        restarts: int,
        back_off: float = 1.0,
        port: str = "auto",
        port_within: float = ports.FREE_WITHIN,
    ) -> None:
        self._command = tuple(command)
        self._folder = folder
        self._log = log
        self._start_within = start_within
        self._restarts = restarts
        self._back_off = back_off
        self._port = port
        self._port_within = port_within
        self._mended = 0
        self._lock = threading.Lock()
        self._share: int | None = None
        self._served: Served | None = None
        self._never = threading.Event()

    def serve(self) -> Served:
        """Return where the server is; the first worker starts it, the others wait for that."""
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
                    _end_keeper(self._folder)
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
                remove_unused(self._folder)  # where there is no keeper
            self._served = None

    def _join(self) -> None:
        if self._share is None:
            self._share = join(self._folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of whoever starts or mends."""
        with (self._folder / "start.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _running(self) -> dict[str, Any] | None:
        """Return what is known of the server; None when none runs."""
        state = told_in(self._folder, "server.json")
        return state if state and living(state) and _is_alive(state["server"]) else None

    def _last_generation(self) -> int:
        return int((told_in(self._folder, "keeper.json") or {"generation": 0})["generation"])

    def _start(self, generation: int) -> Served:
        """Start a keeper with its server, and wait until that is ready. To be called alone."""
        find_program(self._command[0])
        _end_keeper(self._folder)  # one whose server is dead, or whose worker was killed while it waited for the server
        sweep(self._folder)
        (self._folder / "server.json").unlink(missing_ok=True)
        logger.info("starting %s", " ".join(self._command))
        started = time.monotonic()
        keeper, start = self._spawn(generation)
        told = started
        while (state := told_in(self._folder, "server.json")) is None:
            waited = time.monotonic() - started
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
        logger.info("the basecall server is at %s after %.0f s", state["address"], time.monotonic() - started)
        return _served(state)

    def _spawn(self, generation: int) -> tuple[subprocess.Popen[bytes], int]:
        """Start a keeper, which holds the port's lock from now on; return it, and where its part of the log begins."""
        port = ports.claim(self._port, within=self._port_within)
        try:
            with self._log.open("ab") as log:
                start = log.tell()
                keeper = subprocess.Popen(
                    [sys.executable, "-m", "infra.dorado_keeper", self._folder, str(generation), *self._command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(_paths())},
                    start_new_session=True,
                    pass_fds=() if port is None else (port,),
                )
        finally:
            if port is not None:
                os.close(port)
        told = {"generation": generation, "keeper": keeper.pid, "keeper_since": began(keeper.pid)}
        write_json(self._folder / "keeper.json", told)
        return keeper, start

    def _tail(self, start: int = 0) -> str:
        """Return the last lines of the log."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(start, self._log.stat().st_size - 4000))
                return "\n".join(log.read(4000).decode(errors="replace").splitlines()[-12:])
        except OSError:
            return ""


def _paths() -> list[str]:
    """Return where Python finds our packages: a worker's working folder need not be ours."""
    return [str(Path(__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _served(state: dict[str, Any]) -> Served:
    return Served(state["address"], state["generation"])


def _is_alive(process: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    return False


def _end_keeper(folder: Path) -> None:
    """End the keeper of a folder and its server, and wait until they are gone."""
    keeper = keeper_of(folder)
    if keeper is None:
        return
    family = [keeper]
    with suppress(psutil.NoSuchProcess):
        family += keeper.children(recursive=True)
        keeper.terminate()
    _, left = psutil.wait_procs(family, timeout=GRACE)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=GRACE)
