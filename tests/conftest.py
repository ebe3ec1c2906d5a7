"""What the whole test session shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.prefect_server import prefect_api


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Prefect home of the session's own: tests leave the user's database alone."""
    return tmp_path_factory.mktemp("prefect")


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
