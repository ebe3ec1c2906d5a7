"""What the whole test session shares."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from infra.prefect_server import prefect_api
from tests.commands import end_left
from tests.slurm import jobs, slurm, testbed

# How long an example takes is the machine's affair.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that wait for clusters and servers: processes that share the files end at about one time."""
    waiting = {item.path for item in items if item.get_closest_marker("slurm") or item.get_closest_marker("deployment")}
    items.sort(key=lambda item: item.path not in waiting)


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database as Prefect's server makes it in 15 s of CPU, to be copied into homes; made once for all."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prefect-template"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = shared / "prefect.db"
        if not made.exists():
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
            clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
            home = {"PREFECT_HOME": str(shared / "home")}
            subprocess.run(command, env={**clean, **home}, check=True, capture_output=True)
            (shared / "home" / "prefect.db").rename(made)
    return made


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Path:
    """A Prefect home of the session's own: tests leave the user's database alone."""
    home = tmp_path_factory.mktemp("prefect")
    shutil.copy(prefect_database, home)
    return home


@pytest.fixture(scope="session")
def prefect_url(prefect_home: Path) -> Iterator[str]:
    """A real Prefect server, started once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PREFECT_HOME", str(prefect_home))
    patch.delenv("PREFECT_API_URL", raising=False)
    said: list[str] = []
    with prefect_api(log_folder=prefect_home, announce=said.append) as url:
        assert said
        assert os.environ["PREFECT_API_URL"] == url
        yield url
    patch.undo()


@pytest.fixture(scope="session")
def _slurm() -> Iterator[None]:
    """A real Slurm of the session's own, started once."""
    with testbed() as configuration, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # jobs import `tests`
        yield


@pytest.fixture(autouse=True)
def _no_command_left() -> Iterator[None]:
    """What a test that failed has started ends with it; else the tests after it would fail of that."""
    yield
    assert not end_left()


@pytest.fixture
def slurm_here(_slurm: None) -> Iterator[None]:
    """The session's Slurm, with no job left by the test."""
    yield
    running = end_left()  # they would replace the jobs that are cancelled here
    left = jobs()
    if left:
        slurm("scancel", *left)  # for the tests after this one
    assert not running
    assert not left
