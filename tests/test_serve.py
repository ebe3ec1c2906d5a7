"""`shoal serve` for real: server, worker, schedule and watch from one command, on PostgreSQL; killed and stopped."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from deployments import serve as serving
from deployments.serve import Home, database_url, environment, password
from tasks.core.errors import SettingsError
from tasks.formats.workspace import Workspace, read_json
from tests.browser import browser
from tests.making import write_pod5
from tests.servers import free_port, http_get, http_post, postgres, started_by, wait_until

SHOAL = Path(sys.executable).with_name("shoal")
WATCH = """
settled_for = 0.5
idle_after = 3600
batch_samples = 100000
[engine]
kind = "null"
"""


class Served:
    """A running `shoal serve`."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.data = folder / "data"
        self.out = folder / "calls"
        self.home = Home(folder=folder / "home")
        self.data.mkdir()
        (folder / "watch.toml").write_text(WATCH)
        self._log = (folder / "serve.log").open("w+")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        (folder / "lab.toml").write_text(f'name = "lab"\nroots = ["{folder}/data", "{folder}/calls"]\n')
        site = ["--site", folder / "lab.toml", "--settings", folder / "watch.toml"]
        options = ["--out", self.out, "--every", "30s", "--port", str(port), "--home", self.home.folder]
        self.process = subprocess.Popen(
            [SHOAL, "serve", self.data, *options, *site, *more],
            stderr=self._log,
            env=clean,
        )

    def told(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def wait_for(self, words: str, seconds: float = 600) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.told()
            return words in self.told()

        wait_until(said, seconds=seconds, telling=self.told)

    def ask(self, path: str, **body: Any) -> Any:
        user, word = self.home.auth.read_text().strip().split(":")
        token = http_get(f"{self.url}/csrf-token", params={"client": "tests"}, auth=(user, word)).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "tests"}
        answer = http_post(f"{self.url}{path}", json=body, auth=(user, word), headers=headers)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def children(self, words: str = "") -> list[psutil.Process]:
        return started_by(self.process.pid, words)

    def reads_called(self, run: str) -> int:
        merged = read_json(Workspace(self.out / run).merged)
        return int(merged["result"]["reads"]) if merged else 0

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(240)
            self.process.kill()
            self.process.wait()
        self._log.close()


@pytest.fixture
def on_postgres(tmp_path: Path) -> Iterator[Served]:
    with postgres() as url:
        served = Served(tmp_path, "--database", url)
        try:
            yield served
        finally:
            served.close()


@pytest.mark.deployment
@pytest.mark.browser
@pytest.mark.timeout(1800)
def test_a_workstation_from_one_command(on_postgres: Served) -> None:
    served = on_postgres
    served.wait_for("ready: ")
    assert not list(served.home.prefect.glob("*.db")), "SQLite is used beside PostgreSQL"
    assert stat.S_IMODE(served.home.auth.stat().st_mode) == 0o600
    assert served.home.auth.read_text().strip() not in served.told()
    assert http_get(f"{served.url}/flow_runs/00000000-0000-0000-0000-000000000000").status_code == 401

    write_pod5(served.data / "run" / "pod5" / "0.pod5", [20_000] * 5)
    wait_until(lambda: served.reads_called("run") == 5, seconds=600, telling=served.told)

    site = served.url.removesuffix("/api")
    with browser() as tab:  # the page asks for the password, and finds the API where it came from itself
        tab.open(f"{site}/runs")
        tab.wait_for("Login")
        tab.screenshot("login")
        tab.value("document.querySelector('input').focus()")
        tab.type(served.home.auth.read_text().strip())
        tab.press("Login")
        tab.wait_for("FAX12345 sample")
        tab.screenshot("served-runs")

    why = refused(served, out="/elsewhere/calls")
    assert "out: /elsewhere/calls is outside the folders that site lab allows" in why

    (server,) = served.children("server start")
    server.kill()
    served.wait_for("the server has died")
    write_pod5(served.data / "run" / "pod5" / "1.pod5", [20_000] * 5, first=5)
    (served.data / "run" / "final_summary.txt").touch()
    wait_until(lambda: served.reads_called("run") == 10, seconds=600, telling=served.told)
    runs = served.ask("/flow_runs/filter", flow_runs={"tags": {"all_": ["watch"]}})
    assert {run["state"]["type"] for run in runs} <= {"COMPLETED", "RUNNING"}
    assert {run["name"].split()[0] for run in runs} == {"FAX12345"}

    everything = served.children()
    assert len(everything) >= 2
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(240) == 0
    assert not psutil.wait_procs(everything, timeout=120)[1]


def refused(served: Served, **parameters: str) -> str:
    """Ask for a run; wait until it has failed, and say why."""
    (caller,) = served.ask("/deployments/filter", deployments={"name": {"any_": ["local"]}})
    given = {"input": [str(served.data / "run")], **parameters}
    asked = served.ask(f"/deployments/{caller['id']}/create_flow_run", parameters=given)

    def states() -> list[dict[str, Any]]:
        found = served.ask("/flow_runs/filter", flow_runs={"id": {"any_": [asked["id"]]}})
        return [run["state"] for run in found if run["state"]["type"] == "FAILED"]

    wait_until(lambda: bool(states()), seconds=600, telling=served.told)
    return str(states()[0]["message"])


def test_the_password_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    made = password(file)
    assert made.startswith("shoal:")
    assert len(made) > 30
    assert password(file) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        password(file)


@pytest.mark.parametrize("text", ["", "\n", "shoal", "shoal:", ":secret"])
def test_a_password_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """Prefect's server would ask for none."""
    file = tmp_path / "auth"
    file.touch(0o600)
    file.write_text(text)
    with pytest.raises(SettingsError, match=f"{file} should hold user:password"):
        password(file)


def test_a_password_that_was_cut_off_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth"
    monkeypatch.setattr(secrets, "token_urlsafe", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        password(file)
    monkeypatch.undo()
    assert len(password(file)) > 30
    assert list(tmp_path.iterdir()) == [file]


def test_the_environment_of_server_and_worker(tmp_path: Path) -> None:
    home = Home(folder=tmp_path)
    values = environment(home, host="0.0.0.0", port=4300, database="postgresql://a:b@c/d", auth="shoal:x")
    assert values["PREFECT_API_URL"] == "http://127.0.0.1:4300/api"
    assert values["PREFECT_API_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://a:b@c/d"
    assert values["PREFECT_SERVER_API_AUTH_STRING"] == values["PREFECT_API_AUTH_STRING"] == "shoal:x"
    assert values["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert values["PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE"] == "200"
    bare = environment(home, host="127.0.0.1", port=4300, database=None, auth=None)
    assert not [name for name in bare if "AUTH_STRING" in name or "DATABASE_CONNECTION_URL" in name]


@pytest.mark.parametrize(
    ("host", "url"), [("::1", "http://[::1]:4300/api"), ("::", "http://[::1]:4300/api"), ("lab", "http://lab:4300/api")]
)
def test_the_address_of_the_api(tmp_path: Path, host: str, url: str) -> None:
    values = environment(Home(folder=tmp_path), host=host, port=4300, database=None, auth=None)
    assert (values["PREFECT_API_URL"], values["PREFECT_SERVER_API_HOST"]) == (url, host)


def test_another_database_is_refused_without_telling_its_password() -> None:
    with pytest.raises(SettingsError, match="postgresql://") as refused:
        database_url("mysql://root:secret@host/name")
    assert "secret" not in str(refused.value)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield int(listening.getsockname()[1])


def prepared(folder: Path, port: int, *, host: str = "127.0.0.1", looks: int = 3) -> bool:
    """Serve in this process until the server that answers is prepared, or has been looked at often."""
    home, stop, seen = Home(folder=folder), threading.Event(), list[str]()
    home.create()
    asked = iter(range(looks))

    def answers(url: str) -> bool:
        if next(asked, None) is None:
            stop.set()
        return True

    def prepare() -> None:
        seen.append("prepared")
        stop.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "LOOK_EVERY", 0.01)
        patch.setattr(serving, "answers", answers)
        values = environment(home, host=host, port=port, database=None, auth=None)
        serving.serve(home, values, prepare=prepare, announce=lambda _: None, stop=stop)
    return bool(seen)


def test_a_port_that_is_taken_is_refused_before_anything_is_started(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "spawn", None)
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(SettingsError, match=f"port {taken} is taken; give another with --port"):
            prepared(tmp_path, taken, host=host)
    with pytest.raises(SettingsError, match=r"'192\.0\.2\.1', port 4200, can't be listened on: .*--host"):
        prepared(tmp_path, 4200, host="192.0.2.1")  # nobody's address


@pytest.mark.parametrize("ours", [True, False])
def test_only_a_server_of_ours_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """Another may take the port while ours starts."""
    port = free_port()
    listens = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    program = [sys.executable, "-c", listens if ours else "import time; time.sleep(600)"]
    monkeypatch.setattr(serving, "spawn", lambda *_, **__: subprocess.Popen(program, start_new_session=True))
    assert prepared(tmp_path, port, looks=10_000 if ours else 3) == ours
