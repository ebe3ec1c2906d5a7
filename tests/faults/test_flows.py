"""Whatever ends a flow, and while Slurm or Prefect are away: the ledger is complete, the bytes the same, no job left.

The real command, a real Slurm, a real Prefect server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from infra.processes import end, spawn
from tasks.formats.workspace import Workspace
from tests.commands import finished, while_running
from tests.faults.runs import SLOW, SLOWEST, SLURM_SITE, at_work, complete, nanny_of, run
from tests.servers import http_get, http_post, started_by
from tests.slurm import SITE, jobs, wait_for
from tests.test_flow import start

pytestmark = pytest.mark.slurm


def test_slurm_is_away_while_a_worker_dies(data: Path, site: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = run(data, tmp_path / "out", site, rate=SLOW)
    beat = at_work(process, tmp_path / "out")
    configuration = os.environ["SLURM_CONF"]
    controller = int((Path(configuration).parent / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGTERM)
    wait_for(lambda: not psutil.pid_exists(controller), 120)
    nanny_of(beat).kill()
    time.sleep(35)  # Slurm's commands try for 30 s before they fail
    slurmctld = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
    assert slurmctld is not None
    subprocess.run([slurmctld, "-f", configuration], check=True)
    complete(process, data, tmp_path / "out", undisturbed)


def test_however_the_flow_ends_the_same_command_goes_on(
    data: Path, site: Path, tmp_path: Path, undisturbed: dict[str, str], prefect_url: str
) -> None:
    """Killed, cancelled in Prefect; while it runs, another is refused."""
    out = tmp_path / "out"
    killed = run(data, out, site, rate=SLOWEST)
    at_work(killed, out)
    assert "another shoal works on" in finished(run(data, out, site, rate=SLOW), 2)
    killed.kill()
    killed.communicate()
    assert jobs()

    before = running(prefect_url)
    # It takes over at once, and cancels what the first has left in the queue.
    cancelled = run(data, out, site, rate=SLOWEST)
    # Not often: the server that is asked has to take the run, too.
    (mine,) = while_running(lambda: running(prefect_url) - before, cancelled, every=0.5)
    at_work(cancelled, out)
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    http_post(f"{prefect_url}/flow_runs/{mine}/set_state", json=state).raise_for_status()
    assert "cancelled in Prefect; the same command goes on" in finished(cancelled, 4)
    assert not jobs()
    assert http_get(f"{prefect_url}/flow_runs/{mine}").json()["state"]["type"] in ("CANCELLED", "FAILED")

    complete(run(data, out, site), data, out, undisturbed)


def test_a_flow_that_is_stopped_leaves_no_job_and_goes_on(
    data: Path, site: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    for number in (signal.SIGINT, signal.SIGTERM):
        stopped = run(data, out, site, rate=SLOW)
        at_work(stopped, out)
        stopped.send_signal(number)
        assert "the same command goes on" in finished(stopped, 4)
        assert not jobs()
    complete(run(data, out, site), data, out, undisturbed)


def running(prefect_url: str) -> set[str]:
    """Return the ids of the flow runs at work; one that was killed counts as running, too."""
    asked = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}, "parent_task_run_id": {"is_null_": True}}}
    return {one["id"] for one in http_post(f"{prefect_url}/flow_runs/filter", json=asked).raise_for_status().json()}


def test_prefect_is_away(
    data: Path, site: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own server: it hangs, dies, and is there again after a while."""
    monkeypatch.delenv("PREFECT_API_URL")
    process = run(data, tmp_path / "out", site, rate=SLOW)
    at_work(process, tmp_path / "out")
    (server,) = started_by(process.pid, "prefect server start")
    server.suspend()
    time.sleep(5)
    command, environment = server.cmdline(), server.environ()
    server.kill()
    time.sleep(20)
    again = spawn(command, log=tmp_path / "server.log", environment=environment)
    try:
        complete(process, data, tmp_path / "out", undisturbed)
    finally:
        end(again, grace=60)


def test_launch_and_merge_in_jobs_of_their_own(data: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    """Both partitions take bundles from one queue; the stages' own jobs have their own resources."""
    file = tmp_path / "site.toml"
    stages = '[launch]\nwalltime = "10:00"\npartition = "a100"\n[merge]\nwalltime = "10:00"\nthreads = 2\n'
    file.write_text(SITE.read_text().replace("[split]", stages + "[split]", 1))
    process = start(data, tmp_path / "out", "--site", str(file), "--rate", "400000")
    complete(process, data, tmp_path / "out", undisturbed)
    ended = (Path(os.environ["SLURM_CONF"]).parent / "jobs.txt").read_text().splitlines()
    run_id = Workspace(tmp_path / "out").run_id.read_text().strip()
    mine = [line for line in ended if f"Name={run_id} " in line]
    assert {"a100", "h100"} == {
        word.removeprefix("Partition=") for line in mine for word in line.split() if "Partition=" in word
    }
    assert len(mine) >= 4


def test_what_can_never_run_is_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(SLURM_SITE.replace("gpu:H100:1", "gpu:V100:1"))
    said = finished(start(data, tmp_path / "out", "--site", str(file)), 2)
    assert "[split]: Slurm refuses it" in said
    assert not (tmp_path / "out").exists()
