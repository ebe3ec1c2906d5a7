"""The command `shoal run` as people use it: a real Prefect server, a real Dask cluster, real faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tasks.formats.commit import committed_ids
from tasks.formats.workspace import Workspace
from tests.making import write_pod5
from tests.servers import started_by
from tests.test_pipeline import check_from_outside, digests

SHOAL = Path(sys.executable).with_name("shoal")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    for number in range(4):
        write_pod5(folder / f"{number}.pod5", [25_000] * 20, first=20 * number, acquisition_id="4f10f10f" * 5)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    site = folder / "site.toml"
    site.write_text(f'name = "lab"\numask = "0027"\nroots = ["{data}", "{folder}"]\n')
    assert finished(start(data, folder / "out", "--site", str(site)))["reads"] == 80
    return folder / "out"


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start a run that takes some seconds: 2 M samples at 400,000 samples/s per worker."""
    command = [SHOAL, "run", data, "--out", out, "--engine", "null", "--batch-samples", "100000", *more, "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str], status: int = 0) -> Any:
    """Wait for a run, expect its exit status, and return what it printed."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    return json.loads(output) if output else errors


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something to come true while a process runs."""
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Find the Dask worker processes: children of the flow that nannies have spawned."""
    return started_by(process.pid, "spawn_main")


def test_a_run_is_complete_and_seen_in_prefect(undisturbed: Path, data: Path, prefect_url: str) -> None:
    assert "80 reads in" in check_from_outside(undisturbed, data)
    ours = {"flow_runs": {"tags": {"all_": ["run:4f10f10f"]}}}
    runs = httpx.post(f"{prefect_url}/flow_runs/filter", json=ours).json()
    assert {run["state"]["name"] for run in runs} == {"Completed"}
    names = {run["name"] for run in httpx.post(f"{prefect_url}/task_runs/filter", json=ours).json()}
    assert any(name.startswith("split 00000 · ") for name in names), names


def test_files_have_the_modes_that_the_site_wants(undisturbed: Path) -> None:
    assert modes(*undisturbed.iterdir()) == {0o640, 0o750}


def modes(*paths: Path) -> set[int]:
    """Return the modes of files and folders, and of all that is in these."""
    return {path.stat().st_mode & 0o777 for given in paths for path in (given, *given.rglob("*"))}


def test_running_again_does_nothing_and_says_so(undisturbed: Path, data: Path) -> None:
    before = time.monotonic()
    process = start(data, undisturbed)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "complete already" in errors
    assert json.loads(output)["reads"] == 80
    assert time.monotonic() - before < 30


def test_kill_the_flow_and_run_again(undisturbed: Path, data: Path, tmp_path: Path, prefect_url: str) -> None:
    out = tmp_path / "out"
    process = start(data, out, "--rate", "200000")
    wait_until(lambda: len(committed_ids(Workspace(out))) >= 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(children, timeout=30)
    assert 3 <= len(committed_ids(Workspace(out))) < 20
    (Workspace(out).staging / "batch.attempt" / "what is left").mkdir(parents=True)  # whatever the kill itself left
    assert finished(start(data, out))["reads"] == 80
    assert not list(Workspace(out).staging.iterdir())
    check_from_outside(out, data)
    assert digests(out) == digests(undisturbed)


def test_kill_a_worker(undisturbed: Path, data: Path, tmp_path: Path, prefect_url: str) -> None:
    out = tmp_path / "out"
    process = start(data, out, "--rate", "200000")
    wait_until(lambda: len(committed_ids(Workspace(out))) >= 1, process)
    workers_of(process)[0].kill()
    assert finished(process)["reads"] == 80
    assert not list(Workspace(out).staging.iterdir())
    check_from_outside(out, data)
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_cleanly(data: Path, tmp_path: Path, prefect_url: str, number: int) -> None:
    out = tmp_path / "out"
    process = start(data, out, "--rate", "100000")
    wait_until(lambda: len(committed_ids(Workspace(out))) >= 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    assert "the same command goes on" in finished(process, 4)
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_two_runs_on_one_folder_are_refused(data: Path, tmp_path: Path, prefect_url: str) -> None:
    out = tmp_path / "out"
    first = start(data, out, "--rate", "400000")
    wait_until(lambda: (out / ".shoal" / "plan").exists(), first)
    assert "another shoal works on" in finished(start(data, out), 2)
    assert finished(first)["reads"] == 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "gpu"], "engine.kind: 'gpu'"),
        (["--batch-samples", "5"], "batch_samples: 5"),
        (["--model", "nothing"], "engine.model: 'nothing' is no bundled model (minnow-v6)"),
        (["--site", "mars"], "site: 'mars'"),
        (["--site", "confined.toml"], "outside the folders that site confined allows: /srv/runs"),
    ],
)
def test_wrong_settings_are_refused(data: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "confined.toml").write_text('name = "confined"\nroots = ["/srv/runs"]\n')
    command = [SHOAL, "run", data, "--out", tmp_path / "out", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
