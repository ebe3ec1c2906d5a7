"""A Prefect API for a run. The servers are real; each start costs 5 to 15 s, so there are few."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.context import refresh_global_settings_context

from infra.prefect_server import answers, prefect_api
from tasks.core.errors import SettingsError, ShoalError
from tests.servers import http_get, http_post, started_by

#: Opens an API, runs a tiny flow, and tells whether the API knows of it.
RUN = """
import sys
from pathlib import Path
from infra.prefect_server import prefect_api
with prefect_api(log_folder=Path(sys.argv[1]), announce=print) as url:
    from prefect import flow, settings, task
    assert settings.PREFECT_API_URL.value() == url, settings.PREFECT_API_URL.value()
    double = task(lambda number: 2 * number, name="double")
    assert flow(lambda: [double(number) for number in range(3)], name=sys.argv[2])() == [0, 2, 4]
    import httpx
    flows = httpx.post(f"{url}/flows/filter", json={}, timeout=60).json()
    assert sys.argv[2] in [found["name"] for found in flows], flows
"""


def start(folder: Path, name: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Run a flow in a process of its own, as `shoal run` does."""
    logs = folder / name
    logs.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(logs), name],
        env={**os.environ, "PREFECT_LOGGING_LEVEL": "WARNING", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """Wait for it, expect success, and return what it said."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """This process talks to the session's server again after a test that changes the environment."""
    yield
    refresh_global_settings_context()


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefect_database: Path) -> Path:
    """No API is configured; the Prefect home has an empty database."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(prefect_database, tmp_path / "home")
    return tmp_path


def servers() -> set[psutil.Process]:
    """Servers that we have started."""
    return set(started_by(os.getpid(), "prefect server start"))


def test_a_flow_runs_on_the_sessions_server(prefect_url: str, tmp_path: Path) -> None:
    assert http_get(f"{prefect_url}/health").json() is True
    assert "starting" not in finished(start(tmp_path, "given", {"PREFECT_API_URL": prefect_url}))


def test_a_configured_api_that_does_not_answer(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    with (
        pytest.raises(SettingsError, match=r"http://127\.0\.0\.1:1/api does not answer.*unset PREFECT_API_URL"),
        prefect_api(log_folder=unset, announce=print),
    ):
        pytest.fail("entered")


def test_an_api_that_is_silent_is_asked_again() -> None:
    asked: list[str] = []
    heard = threading.Event()

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) == 1:
                heard.wait(120)  # longer than anybody listens
            else:
                self.send_response(200)
                self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert answers(f"http://127.0.0.1:{server.server_port}/api", within=60)
        finally:
            heard.set()
            server.shutdown()
            thread.join()
    assert asked == ["/api/health"] * 2


def test_a_server_that_dies_tells_why(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{unset}/none/x.db")
    with (
        pytest.raises(ShoalError, match="unable to open database file"),
        prefect_api(log_folder=unset, announce=lambda line: None),
    ):
        pytest.fail("entered")


def test_two_runs_at_once_on_a_new_home(unset: Path) -> None:
    shutil.rmtree(unset / "home")
    both = [start(unset, name, {}) for name in ("first", "second")]
    said = [finished(process) for process in both]
    assert all("starting a Prefect server" in each for each in said)
    assert (unset / "home" / "prefect.db").exists()


def test_neither_profiles_nor_proxies_come_between(unset: Path) -> None:
    """A profile without an address, as Prefect's own default is, and a proxy that can't reach our loopback."""
    (unset / "home" / "profiles.toml").write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_LOGGING_LEVEL = "WARNING"\n'
    )
    nowhere = "http://127.0.0.1:9"
    finished(start(unset, "proxied", {"http_proxy": nowhere, "HTTP_PROXY": nowhere, "no_proxy": "", "NO_PROXY": ""}))


def test_it_is_ended_and_the_environment_put_back_after_an_error(unset: Path) -> None:
    environment, before = dict(os.environ), servers()
    meanwhile: list[str] = []

    def look() -> None:
        meanwhile.append(os.environ["PREFECT_API_URL"])
        assert not answers(meanwhile[0])

    with (  # noqa: PT012
        pytest.raises(KeyError),
        prefect_api(log_folder=unset, announce=lambda line: None, meanwhile=look) as url,
    ):
        assert [os.environ["PREFECT_API_URL"]] == [url] == meanwhile
        (ours,) = servers() - before
        assert not ours.children()  # one process, which dies with us
        raise KeyError
    assert not ours.is_running()
    assert dict(os.environ) == environment


def test_a_server_for_other_machines_asks_for_a_password(unset: Path) -> None:
    said: list[str] = []
    with prefect_api(log_folder=unset, announce=said.append, host="127.0.0.2") as url:
        assert url.startswith("http://127.0.0.2:")
        user, _, password = os.environ["PREFECT_API_AUTH_STRING"].partition(":")
        ask = partial(http_post, f"{url}/flow_runs/filter", json={})
        assert ask().status_code == 401
        assert ask(auth=(user, password)).status_code == 200
    assert "PREFECT_API_AUTH_STRING" not in os.environ


def test_an_api_that_workers_cant_reach_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://localhost:4200/api")
    with (
        pytest.raises(SettingsError, match="workers on other machines can't reach"),
        prefect_api(log_folder=tmp_path, announce=pytest.fail, host="127.0.0.2"),
    ):
        pass
