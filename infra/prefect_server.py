"""A Prefect API for a run: the one that is configured, or a server process of our own.

Prefect's ephemeral mode does not go with Dask: each worker process starts yet another server. So with nothing
configured, a real `prefect server` runs beside the flow, on its usual database: `prefect server start` shows the run
later.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import Popen

from infra.processes import end, spawn
from tasks.core.errors import SettingsError, ShoalError

#: What makes a server quick and quiet; each only where it is not set already. Batched recorders cost a fifth of the CPU
#: and keep task runs from being lost when a server falls behind.
SERVER_SETTINGS = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TRIGGERS_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Seconds; its own 10 and 5 fail requests, and with them runs, where disk or CPU are busy for a while.
    "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
    "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
}
#: For flow and workers.
CLIENT_SETTINGS = {
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "DO_NOT_TRACK": "1",
}
LOOPBACK = "127.0.0.1"
#: Seconds between lines that say we still wait.
PATIENCE = 30.0
#: Seconds given to a configured API that takes connections and says nothing: its machine may be busy.
SILENCE = 60.0
#: Seconds given to the last logs and events.
DELIVERY = 20.0


@contextmanager
def prefect_api(
    *,
    log_folder: Path,
    announce: Callable[[str], None],
    host: str = LOOPBACK,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[str]:
    """Give the URL of a Prefect API, set in the environment for flow and workers while the block runs.

    Args:
        host: Address of this machine that the workers reach. A server on any but loopback asks for a password, which
            is made for this run and is in the environment of the flow and its jobs.
        meanwhile: Done while a server starts, with the environment set.

    Raises:
        SettingsError: an API is configured and does not answer, or is where the workers can't reach it.
    """
    url = _configured_url()
    if url:
        if host != LOOPBACK and urllib.parse.urlsplit(url).hostname in (LOOPBACK, "localhost", "::1"):
            raise SettingsError(
                f"workers on other machines can't reach the Prefect API at {url}; start it on {host} and name that in "
                "PREFECT_API_URL, or unset PREFECT_API_URL, and one is started for this run"
            )
        if not answers(url, within=SILENCE):
            raise SettingsError(
                f"the Prefect API at {url} does not answer; start it, or unset PREFECT_API_URL, "
                "and one is started for this run"
            )
        with _environment(CLIENT_SETTINGS):
            yield url
        return
    port = _free_port(host)
    url = f"http://{host}:{port}/api"
    password = {} if host == LOOPBACK else {"PREFECT_API_AUTH_STRING": f"shoal:{secrets.token_urlsafe(32)}"}
    log = log_folder / "prefect-server.log"
    environment = {
        **SERVER_SETTINGS,
        **os.environ,
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_API_URL": url,
        **{name.replace("PREFECT_", "PREFECT_SERVER_"): value for name, value in password.items()},
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    announce(f"starting a Prefect server on {host}:{port}, usually 5 to 10 s (PREFECT_API_URL names none) …")
    with _environment({**CLIENT_SETTINGS, **_no_proxy(host), **password, "PREFECT_API_URL": url}), ExitStack() as stack:
        with _starting_alone(announce):
            process = spawn(command, log=log, environment=environment)
            stack.callback(end, process)
            meanwhile()
            _wait(process, url, log, announce)
        stack.callback(_deliver)
        yield url


def _deliver() -> None:
    """Send what Prefect's client still holds while the server is there; else it tries for a minute after us."""
    if "prefect.logging" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=DELIVERY, at_exit=False)


def _wait(process: Popen[bytes], url: str, log: Path, announce: Callable[[str], None]) -> None:
    """Wait for the server as long as it lives: a slow machine is no error."""
    pause = threading.Event()
    told = time.monotonic()
    while not answers(url):
        if process.poll() is not None:
            last = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
            raise ShoalError(
                f"Prefect's server ended with status {process.returncode}; its log {log} ends with:\n{last}"
            )
        if time.monotonic() - told > PATIENCE:
            told = time.monotonic()
            announce(f"still waiting for Prefect's server (log: {log}) …")
        pause.wait(0.2)


def _configured_url() -> str:
    """Return the API that environment or active Prefect profile name; the empty string when none does."""
    if "PREFECT_API_URL" in os.environ:
        return os.environ["PREFECT_API_URL"]
    if not (_home() / "profiles.toml").exists():
        return ""
    from prefect.settings import PREFECT_API_URL  # 1.5 s of CPU, wanted only by those who have profiles

    return str(PREFECT_API_URL.value() or "")


def answers(url: str, *, within: float = 0.0) -> bool:
    """Tell whether a Prefect API is there.

    Args:
        within: Seconds in which one that is silent is asked again; where nobody listens, the answer is no at once.
    """
    deadline = time.monotonic() + within
    while True:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return True  # it is there, and asks for a password or a path of its own
        except (OSError, ValueError) as error:
            silent = isinstance(getattr(error, "reason", error), TimeoutError)
            if not silent or time.monotonic() > deadline:
                return False


def _home() -> Path:
    return Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()


def _no_proxy(host: str) -> dict[str, str]:
    """Keep a site's web proxy, which can't reach our loopback, out of the way to our server; in both spellings."""
    before = {os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")} - {""}
    hosts = ",".join([*sorted(before), host])
    return {"no_proxy": hosts, "NO_PROXY": hosts}


@contextmanager
def _starting_alone(announce: Callable[[str], None]) -> Iterator[None]:
    """Let one server at a time start on a home: two would both migrate its database, and one would die of that."""
    home = _home()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (home / "shoal-start.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce("waiting for another run, which is starting its Prefect server …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    _tell_prefect()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _tell_prefect()


def _tell_prefect() -> None:
    """Let Prefect read the environment again, if it has read it: it does so once, when it is imported."""
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context  # not at the top: importing it costs 1.5 s of CPU

        refresh_global_settings_context()
