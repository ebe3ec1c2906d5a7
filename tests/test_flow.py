"""The command `shoal run` as people use it: a real Prefect server, a real Dask cluster, real faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tasks.formats.commit import committed_ids
from tasks.formats.workspace import Workspace
from tests.commands import SHOAL, finished, started, while_running
from tests.making import write_pod5
from tests.servers import http_post, started_by
from tests.test_pipeline import check_from_outside, digests


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
    """Start a run of 2 M samples in 20 batches."""
    command = [SHOAL, "run", data, "--out", out, "--engine", "null", "--batch-samples", "100000", *more, "--json"]
    return started(command)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Find the Dask worker processes: children of the flow that nannies have spawned."""
    return started_by(process.pid, "spawn_main")


def test_a_run_is_complete_and_seen_in_prefect(undisturbed: Path, data: Path, prefect_url: str) -> None:
    assert "80 reads in" in check_from_outside(undisturbed, data)
    ours = {"flow_runs": {"tags": {"all_": ["run:4f10f10f"]}}}
    runs = http_post(f"{prefect_url}/flow_runs/filter", json=ours).json()
    assert {run["state"]["name"] for run in runs} == {"Completed"}
    names = {run["name"] for run in http_post(f"{prefect_url}/task_runs/filter", json=ours).json()}
    assert any(name.startswith("split 00000 · ") for name in names), names


def test_files_have_the_modes_that_the_site_wants(undisturbed: Path) -> None:
    assert modes(*undisturbed.iterdir()) == {0o640, 0o750}


def modes(*paths: Path) -> set[int]:
    """Return the modes of files and folders, and of all that is in these."""
    return {path.stat().st_mode & 0o777 for given in paths for path in (given, *given.rglob("*"))}


def test_running_again_does_nothing_and_says_so(undisturbed: Path, data: Path) -> None:
    before = times(undisturbed)
    process = start(data, undisturbed)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "complete already" in errors
    assert json.loads(output)["reads"] == 80
    assert times(undisturbed) == before


def times(out: Path) -> dict[Path, int]:
    """Return when each file was last written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_kill_the_flow_and_run_again(undisturbed: Path, data: Path, tmp_path: Path, prefect_url: str) -> None:
    """While it is at work, another run on its folder is refused, and does it no harm."""
    out = tmp_path / "out"
    process = start(data, out, "--rate", "6000")  # minutes of work: starting another run takes its time
    while_running(lambda: len(committed_ids(Workspace(out))) >= 1, process)
    assert "another shoal works on" in finished(start(data, out), 2)
    before = len(committed_ids(Workspace(out)))
    while_running(lambda: len(committed_ids(Workspace(out))) > before, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(children, timeout=120)
    assert before < len(committed_ids(Workspace(out))) < 20
    (Workspace(out).staging / "batch.attempt" / "what is left").mkdir(parents=True)  # whatever the kill itself left
    assert finished(start(data, out))["reads"] == 80
    assert not list(Workspace(out).staging.iterdir())
    check_from_outside(out, data)
    assert digests(out) == digests(undisturbed)


def test_kill_a_worker(undisturbed: Path, data: Path, tmp_path: Path, prefect_url: str) -> None:
    out = tmp_path / "out"
    process = start(data, out, "--rate", "40000")
    while_running(lambda: len(committed_ids(Workspace(out))) >= 1, process)
    workers_of(process)[0].kill()
    assert finished(process)["reads"] == 80
    assert not list(Workspace(out).staging.iterdir())
    check_from_outside(out, data)
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_ends_cleanly(data: Path, tmp_path: Path, prefect_url: str, number: int) -> None:
    out = tmp_path / "out"
    process = start(data, out, "--rate", "30000")
    while_running(lambda: len(committed_ids(Workspace(out))) >= 1, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    assert "the same command goes on" in finished(process, 4)
    assert not psutil.wait_procs(children, timeout=120)[1]


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
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
