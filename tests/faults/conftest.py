"""What the faults happen to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import SLURM_SITE
from tests.making import write_pod5
from tests.test_pipeline import digests, settings
from tests.test_pipeline import run as run_here


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("site") / "site.toml"
    file.write_text(SLURM_SITE)
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    for number in range(4):
        write_pod5(folder / f"{number}.pod5", [25_000] * 20, first=20 * number)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What comes of the data without Slurm, Dask and Prefect."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert run_here(settings(data, out=out)).reads == 80
    return digests(out)


@pytest.fixture(autouse=True)
def _here(slurm_here: None, prefect_url: str) -> None:
    """Slurm and Prefect."""
