"""The hardened cluster: its job scripts as text, its healing on a real Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import dask
import distributed
import psutil
import pytest
from distributed.core import Status

from infra import dask_settings
from infra.cluster import SlurmWorkers, open_cluster
from infra.preflight import refuse_site
from infra.site import PoolResources, Site, SplitResources, load_site
from infra.slurm import job_script
from infra.slurm_preflight import cancel_orphans
from tasks.core.errors import SettingsError, ShoalError
from tests.fakes import engine_and_process, open_fake, wait_for_gate, worker_environment
from tests.slurm import SITE, jobs, slurm, wait_for, wait_for_jobs

ROOT = Path(__file__).parents[2]
RESOURCES = PoolResources(
    threads=7,
    memory_per_thread_gb=1.5,
    walltime="02:00:00",
    partition="h100",
    account="lab",
    gres="gpu:H100:1",
    extra=("--qos=long",),
)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PYTHONPATH", "/a folder")
    return job_script(RESOURCES, run_id="shoal-77", slots=2, logs=tmp_path, scratch=Path("/scratch")).splitlines()


@pytest.mark.parametrize(
    "line",
    [
        "#SBATCH -J shoal-77",
        "#SBATCH -p h100",
        "#SBATCH -A lab",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=7",
        "#SBATCH --mem=10752M",
        "#SBATCH -t 0-02:00:00",
        "#SBATCH --gres=gpu:H100:1",
        "#SBATCH --no-requeue",
        "#SBATCH --qos=long",
        "export PYTHONSAFEPATH=1",
        "export OMP_NUM_THREADS=1",
        "export PYTHONPATH='/a folder'",
    ],
)
def test_the_job_script_says(script: list[str], line: str) -> None:
    assert line in script


def test_the_job_script_becomes_the_worker(script: list[str], tmp_path: Path) -> None:
    assert f"#SBATCH -e {tmp_path}/shoal-77-%J.err" in script
    last = [line for line in script if line][-1]
    assert last.startswith("exec ")
    for words in ("--name worker-0", "--nthreads 2", "--nanny", "--no-dashboard", "--death-timeout 60", "/scratch"):
        assert words in last


def test_what_a_stage_does_not_ask_for_is_not_in_the_script(tmp_path: Path) -> None:
    script = job_script(PoolResources(), run_id="shoal-77", slots=1, logs=tmp_path, scratch=None)
    assert "#SBATCH --mem=4096M" in script
    assert "#SBATCH -t 1-00:00:00" in script
    for word in ("#SBATCH -p", "#SBATCH -A", "--gres", "--local-directory"):
        assert word not in script


H100 = PoolResources(memory_per_thread_gb=1, walltime="10:00", partition="h100", gres="gpu:H100:1", maximum=2)
A100 = PoolResources(memory_per_thread_gb=1, walltime="10:00", partition="a100", gres="gpu:A100:1", maximum=1)


@contextmanager
def workers(
    folder: Path, *pools: PoolResources, tell: float = 120, **changes: object
) -> Iterator[tuple[SlurmWorkers, distributed.Client]]:
    """Open a cluster on the testbed, with fake engines."""
    split = SplitResources.model_validate({"pools": [pool.model_dump() for pool in pools], "idle": 3, **changes})
    site = Site(name="test", kind="slurm", interface="lo", split=split, tell_pending_after=tell)
    with open_cluster(
        site, partial(open_fake, folder), slots=1, logs=folder, log_level="INFO", run_id="shoal-test"
    ) as cluster:
        assert isinstance(cluster, SlurmWorkers)
        with distributed.Client(cluster.address, security=cluster.security, set_as_default=False) as client:
            yield cluster, client


def began(folder: Path, number: int) -> list[int]:
    return [int(file.name.split("-")[2]) for file in folder.glob(f"began-{number}-*")]


def settings_of_dask() -> dict[str, object]:
    return {name: dask.config.get(name) for name in dask_settings.SETTINGS}


@pytest.mark.slurm
def test_pools_grow_with_the_work_and_shrink(tmp_path: Path, slurm_here: None) -> None:
    with workers(tmp_path, H100, A100) as (cluster, client):
        assert cluster.slots == 3
        assert cluster.address.startswith("tls://127.0.0.1:")
        time.sleep(2)
        assert not jobs()  # no work, no allocation
        futures = [client.submit(wait_for_gate, number, tmp_path, pure=False) for number in range(5)]
        wait_for(lambda: len(list(tmp_path.glob("began-*"))) == 3)
        assert set(jobs().values()) == {"shoal-test"}
        gpus = client.run(worker_environment, "CUDA_VISIBLE_DEVICES")
        assert all(address.startswith("tls://127.0.0.1:") for address in gpus)
        assert set(gpus.values()) <= {"0", "1"}
        assert set(client.run(worker_environment, "PYTHONSAFEPATH").values()) == {"1"}
        assert all(settings == dask_settings.SETTINGS for settings in client.run(settings_of_dask).values())
        (tmp_path / "gate").touch()
        assert sorted(future.result(timeout=300)[0] for future in futures) == [0, 1, 2, 3, 4]
        del futures
        wait_for_jobs(lambda jobs: not jobs)  # idle workers give their allocations back
    assert "gives its job back" in " ".join(cluster.news())
    assert not list(tmp_path.glob(".tls-*"))


@pytest.mark.slurm
def test_lost_jobs_are_replaced_while_slurm_is_away_too(tmp_path: Path, slurm_here: None) -> None:
    """Two by scancel; then one, by its own process' end, with slurmctld stopped for a while, so that sbatch fails."""
    told: list[str] = []

    def come_up() -> int:
        told.extend(cluster.news())
        return sum("is there: job" in line for line in told)

    with workers(tmp_path, H100, minimum=2) as (cluster, client):
        wait_for(lambda: come_up() == 2)
        before = set(jobs())
        first = client.submit(wait_for_gate, 1, tmp_path, pure=False)
        wait_for(lambda: began(tmp_path, 1))
        slurm("scancel", *before)
        wait_for_jobs(lambda jobs: not before & set(jobs))
        wait_for_jobs(lambda jobs: len(jobs) == 2, state="R")
        wait_for(lambda: come_up() == 4)
        (tmp_path / "gate").touch()
        assert first.result(timeout=300)[0] == 1
        state = Path(os.environ["SLURM_CONF"]).parent
        controller = int((state / "slurmctld.pid").read_text())
        os.kill(controller, signal.SIGTERM)
        wait_for(lambda: not psutil.pid_exists(controller), 120)
        os.kill(min(client.run(os.getppid).values()), signal.SIGKILL)  # the nanny, which is the job
        wait_for(lambda: len(client.nthreads()) == 1)
        time.sleep(4)
        subprocess.run(["slurmctld", "-f", os.environ["SLURM_CONF"]], check=True)
        client.wait_for_workers(2, timeout=300)
        assert client.submit(engine_and_process, 5).result(timeout=300)[:2] == (5, "fake")
        wait_for(lambda: come_up() == 5)
        assert "another takes its place" in " ".join(told)


@pytest.mark.slurm
def test_a_hung_worker_is_replaced(tmp_path: Path, slurm_here: None) -> None:
    with workers(tmp_path, H100, minimum=1) as (cluster, client):
        future = client.submit(wait_for_gate, 1, tmp_path, pure=False)
        wait_for(lambda: began(tmp_path, 1))
        (hung,) = began(tmp_path, 1)
        os.kill(hung, signal.SIGSTOP)
        cluster.replace("h100-0")
        wait_for(lambda: len(began(tmp_path, 1)) == 2)
        (tmp_path / "gate").touch()
        assert future.result(timeout=300)[2] != hung
        wait_for(lambda: not psutil.pid_exists(hung), 120)


@pytest.mark.slurm
def test_others_call_what_one_that_is_set_aside_does_not(tmp_path: Path, slurm_here: None) -> None:
    """It keeps its job, and is no capacity; when nobody else can come, the flow is told."""
    with workers(tmp_path, H100, idle=600) as (cluster, client):
        for name in "h100-0", "h100-1":
            called = client.submit(engine_and_process, 0, pure=False)
            wait_for(lambda called=called: called.done())
            assert cluster.keeps(name)
            cluster.set_aside(name)
            wait_for(lambda: statuses(cluster) == {Status.paused})
        assert not cluster.cluster.trouble
        waiting = client.submit(engine_and_process, 0, pure=False)
        wait_for(lambda: cluster.cluster.trouble)
        with pytest.raises(ShoalError, match="set aside, and nobody is left"):
            cluster.news()
        waiting.release()
        slurm("scancel", *jobs())
        wait_for(lambda: not cluster.keeps("h100-0") and not cluster.keeps("h100-1"))
    assert not jobs()


@pytest.mark.slurm
def test_a_worker_leaves_before_its_allocation_ends(tmp_path: Path, slurm_here: None) -> None:
    """It finishes its bundle, takes no other, and another worker comes."""
    with workers(tmp_path, H100.model_copy(update={"maximum": 1}), drain=540) as (cluster, client):
        futures = [client.submit(wait_for_gate, number, tmp_path, pure=False) for number in range(2)]
        wait_for(lambda: list(tmp_path.glob("began-*")))
        wait_for(lambda: Status.closing_gracefully in statuses(cluster))
        (tmp_path / "gate").touch()
        processes = set()
        while futures:
            processes.add(futures.pop(0).result(timeout=300)[2])
        assert len(processes) == 2
        assert len(list(tmp_path.glob("began-*"))) == 2  # none was cut


def statuses(cluster: SlurmWorkers) -> set[Status]:
    """Return what the scheduler says that its workers do."""
    return {worker.status for worker in list(cluster.cluster.scheduler.workers.values())}


@pytest.mark.slurm
def test_jobs_that_never_become_workers_end_the_run(
    tmp_path: Path, slurm_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared file system lacks what the jobs would run, say."""
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with workers(tmp_path, H100.model_copy(update={"maximum": 4}), minimum=4) as (cluster, _):
        wait_for(lambda: cluster.cluster.trouble)
        with pytest.raises(ShoalError, match=r"5 Slurm jobs in a row ended .* /nowhere/python"):
            cluster.news()


@pytest.mark.slurm
def test_a_job_that_runs_without_a_worker_is_replaced(
    tmp_path: Path, slurm_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node's file system hangs, say."""
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 3600\n")
    hanging.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(hanging))
    monkeypatch.setattr("infra.slurm.START_WITHIN", 1.0)
    with workers(tmp_path, H100, minimum=1) as (cluster, _):
        news: list[str] = []
        wait_for(lambda: news.extend(cluster.news()) or news)
        job, node = re.findall(
            r"^job (\d+) ran for \d+ s on (n\d) and its worker h100-0 did not come up; its log", news[0]
        )[0]
        assert node in ("n1", "n2")
        wait_for_jobs(lambda jobs: jobs and job not in jobs)


def a_program(folder: Path, name: str, script: str, patch: pytest.MonkeyPatch) -> None:
    """Put a program before those that PATH finds; `$REAL` is the one that it found so far."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\nREAL={shutil.which(name)}\n{script}\n")
    file.chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.slurm
def test_a_block_is_left_while_a_job_is_submitted(
    tmp_path: Path, slurm_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No job stays behind, and the end is no error."""
    a_program(tmp_path / "slow", "sbatch", f'touch {tmp_path}/began; sleep 3; exec $REAL "$@"', monkeypatch)
    with workers(tmp_path, H100) as (_, client):
        future = client.submit(engine_and_process, 0)
        wait_for((tmp_path / "began").exists)
        future.release()
    assert not jobs()


@pytest.mark.slurm
def test_a_job_that_slurm_took_though_sbatch_failed_is_cancelled(
    tmp_path: Path, slurm_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be one more than there may be, and nobody would give it back."""
    timeout = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    script = (
        f'$REAL "$@" || exit; [ -e {tmp_path}/failed ] || {{ touch {tmp_path}/failed; echo {timeout} >&2; exit 1; }}'
    )
    a_program(tmp_path / "failing", "sbatch", script, monkeypatch)
    with workers(tmp_path, H100, minimum=1) as (cluster, _):
        wait_for_jobs(lambda jobs: list(jobs) == [cluster.cluster.job_of("h100-1")])
        assert f"sbatch failed, it is tried again in 5 s: {timeout}" in cluster.news()


def test_a_command_of_slurms_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.slurm.ANSWER_WITHIN", 1.0)
    process = tmp_path / "process"
    a_program(tmp_path / "hanging", "sbatch", f"echo $$ > {process}; exec sleep 3600", monkeypatch)
    for name in "squeue", "scancel":
        a_program(tmp_path / "hanging", name, "exit 0", monkeypatch)
    with workers(tmp_path, H100, minimum=1) as (cluster, _):
        news: list[str] = []
        wait_for(lambda: news.extend(cluster.news()) or (news and process.exists()))
    assert "sbatch failed, it is tried again in 5 s: sbatch gave no answer for 1 s" in news
    wait_for(lambda: not psutil.pid_exists(int(process.read_text())))


def a_site(**split: object) -> Site:
    return Site(name="lab", kind="slurm", interface="lo", split=SplitResources.model_validate(split))


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"partition": "mars"}, "site lab, [split]: Slurm refuses it: invalid partition specified: mars"),
        ({"gres": "gpu:V100:1"}, "Requested node configuration is not available"),
        ({"gres": "gpu:H100:3"}, "Requested node configuration is not available"),
        ({"threads": 64}, "not available"),
        ({"partition": "a100", "walltime": "03:00:00"}, "(PartitionTimeLimit): partition a100 allows 0-02:00:00"),
        ({"walltime": "2"}, "partition h100 allows 1-00:00:00"),
        ({"extra": ["--nonsense"]}, "unrecognized option"),
        ({"pools": [{"partition": "h100"}, {"partition": "mars"}]}, "[split.pools.1]: Slurm refuses it: invalid"),
    ],
)
def test_what_can_never_run_is_told(slurm_here: None, split: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        refuse_site(a_site(**split))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slurm
def test_what_can_run_is_not_refused(slurm_here: None) -> None:
    refuse_site(
        a_site(gres="gpu:2", walltime=1, pools=[{"partition": "h100"}, {"partition": "a100", "walltime": "10:00"}])
    )
    refuse_site(load_site(str(SITE)))


def test_where_there_is_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="there is no sbatch here"):
        refuse_site(a_site())


@pytest.mark.slurm
def test_a_job_that_waits_is_told_with_slurms_reason(tmp_path: Path, slurm_here: None) -> None:
    filling = slurm("sbatch", "--parsable", "-p", "a100", "-N2", "--exclusive", "-o/dev/null", "--wrap", "sleep 600")
    try:
        wait_for_jobs(lambda jobs: filling in jobs, state="R")
        with workers(tmp_path, A100, minimum=1, tell=1) as (cluster, _):
            news: list[str] = []
            wait_for(lambda: news.extend(cluster.news()) or "Slurm says: Resources" in " ".join(news))
    finally:
        slurm("scancel", filling)
        wait_for_jobs(lambda jobs: not jobs)


@pytest.mark.slurm
def test_orphans_are_found_by_name(slurm_here: None) -> None:
    for name in ("shoal-dead", "shoal-dead", "shoal-other"):
        slurm("sbatch", "-J", name, "-o/dev/null", "--wrap", "exec sleep 600")
    assert cancel_orphans("shoal-dead") == 2
    wait_for_jobs(lambda jobs: list(jobs.values()) == ["shoal-other"])
    assert cancel_orphans("shoal-other") == 1
    wait_for_jobs(lambda jobs: not jobs)


def test_ctrl_c_stays_what_it_was() -> None:
    """dask-jobqueue makes it a silent end with status 0."""
    code = (
        "import signal; before = signal.getsignal(signal.SIGINT); import infra.slurm; "
        "assert signal.getsignal(signal.SIGINT) is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_workers_import_the_flow_without_dask_jobqueue() -> None:
    """They may do so in any thread, where its import fails."""
    code = "import sys, flows.basecall; assert 'dask_jobqueue' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
