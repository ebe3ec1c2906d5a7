"""Whatever dies on the cluster, and whenever: the ledger is complete, the bytes are the same, no job is left.

The real command, a real Slurm, a real Prefect server. One fault per test, while both workers are at work.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from infra.processes import end, spawn
from infra.workers import read_heartbeats
from tasks.core.liveness import Beat
from tasks.formats.commit import committed_ids
from tasks.formats.workspace import Workspace
from tests.commands import finished, while_running
from tests.making import write_pod5
from tests.servers import http_get, http_post, started_by
from tests.slurm import SITE, jobs, slurm, wait_for
from tests.test_flow import modes, start
from tests.test_pipeline import check_from_outside, digests, settings
from tests.test_pipeline import run as run_here

pytestmark = pytest.mark.slurm
#: Samples/s of a worker with which a run has work for one fault, however late another worker comes; and for four, or
#: until other runs have started beside it.
SLOW, SLOWEST = 15_000, 5_000

SLURM_SITE = """
name = "faults"
kind = "slurm"
interface = "lo"
umask = "0027"
late_after = 3
dead_after = 20
[split]
partition = "h100"
gres = "gpu:H100:1"
memory_per_thread_gb = 1
maximum = 2
minimum = 2
walltime = "30:00"
"""


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


def run(data: Path, out: Path, site: Path, rate: int = 60_000) -> subprocess.Popen[str]:
    """Start a run of 2 M samples at so many samples/s per worker."""
    return start(data, out, "--site", str(site), "--rate", str(rate))


def at_work(process: subprocess.Popen[str], out: Path, commits: int = 1) -> Beat:
    """Wait until something is committed and two workers are in the middle of more; return what one of them tells."""
    folder = Workspace(out).heartbeats

    def both() -> list[Beat]:
        living = [beat for beat in read_heartbeats(folder) if runs(beat.process)]
        return living if len({beat.worker for beat in living}) == 2 else []

    while_running(lambda: len(committed_ids(Workspace(out))) >= commits, process)
    return while_running(both, process)[0]


def runs(process: int) -> bool:
    """Tell whether a process is there, and not suspended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    return False


def complete(process: subprocess.Popen[str], data: Path, out: Path, undisturbed: dict[str, str]) -> None:
    """The run must end, with every read once, with the very bytes of a run without faults, and with no job left."""
    assert finished(process)["reads"] == 80
    assert digests(out) == undisturbed
    check_from_outside(out, data)
    assert not jobs()


def job_of(beat: Beat) -> str:
    return str(psutil.Process(beat.process).environ()["SLURM_JOB_ID"])


def nanny_of(beat: Beat) -> psutil.Process:
    parent = psutil.Process(beat.process).parent()
    assert parent is not None
    assert "dask_worker" in " ".join(parent.cmdline())
    return parent


def kill_worker(beat: Beat) -> None:
    os.kill(beat.process, signal.SIGKILL)


def kill_nanny(beat: Beat) -> None:
    nanny_of(beat).kill()


def cancel_job(beat: Beat) -> None:
    slurm("scancel", job_of(beat))


def stop_worker(beat: Beat) -> None:
    os.kill(beat.process, signal.SIGSTOP)


def stop_worker_and_nanny(beat: Beat) -> None:
    os.kill(nanny_of(beat).pid, signal.SIGSTOP)
    os.kill(beat.process, signal.SIGSTOP)


def node_down(beat: Beat) -> None:
    slurm("scontrol", "update", f"nodename={node_of(beat)}", "state=down", "reason=test")


def node_drained(beat: Beat) -> None:
    slurm("scontrol", "update", f"nodename={node_of(beat)}", "state=drain", "reason=test")


def walltime_reached(beat: Beat) -> None:
    slurm("scontrol", "update", f"jobid={job_of(beat)}", "timelimit=1")


def node_of(beat: Beat) -> str:
    return slurm("squeue", "--noheader", "--jobs", job_of(beat), "--format", "%N")


@pytest.fixture
def _nodes_up() -> Iterator[None]:
    """Nodes that a test takes down come back after it."""
    yield
    for node in ("n1", "n2"):
        with suppress(AssertionError):  # it was not down
            slurm("scontrol", "update", f"nodename={node}", "state=resume")
    wait_for(lambda: "down" not in slurm("sinfo", "-h", "-N", "-o", "%T"), 120)


@pytest.mark.parametrize(
    "faults",
    [
        (kill_worker, cancel_job, stop_worker, node_drained),
        (kill_nanny, stop_worker_and_nanny, node_down, walltime_reached),
    ],
)
def test_one_fault_of_a_worker_after_another(
    faults: tuple[Callable[[Beat], None], ...],
    data: Path,
    site: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    _nodes_up: None,  # noqa: PT019
) -> None:
    process = run(data, tmp_path / "out", site, rate=SLOWEST)
    for number, fault in enumerate(faults, start=1):
        beat = at_work(process, tmp_path / "out", commits=number)
        fault(beat)
        if fault is not node_drained:
            patience = 300 if fault is walltime_reached else 180  # Slurm counts it in minutes
            wait_for(lambda beat=beat: not psutil.pid_exists(beat.process), patience)
    complete(process, data, tmp_path / "out", undisturbed)
    assert modes(*(tmp_path / "out").glob("[!.]*")) == {0o640, 0o750}, "the jobs have not the site's umask"


def test_slurm_is_away_while_a_worker_dies(data: Path, site: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    process = run(data, tmp_path / "out", site, rate=SLOW)
    beat = at_work(process, tmp_path / "out")
    configuration = os.environ["SLURM_CONF"]
    controller = int((Path(configuration).parent / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGTERM)
    wait_for(lambda: not psutil.pid_exists(controller), 120)
    kill_nanny(beat)
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
