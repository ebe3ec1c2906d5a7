"""A real Dask cluster over TLS, with engines in its workers, and workers that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import dask
import distributed
import psutil
import pytest
from distributed.core import Status
from prefect import flow, task
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_ENABLED, temporary_settings
from prefect.task_engine import run_task_sync
from prefect_dask.task_runners import PrefectDaskFuture

from flows.rounds import _is_api_trouble, _result
from infra import dask_settings
from infra.cluster import Cluster, LocalWorkers, open_cluster, task_runner
from infra.site import Site
from tasks.core.errors import EngineError
from tests.fakes import (
    engine_and_process,
    open_broken,
    open_fake,
    open_large,
    open_slowly,
    open_slowly_again,
    wait_for_gate,
    worker_environment,
)
from tests.slurm import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """Let workers import `tests.fakes`: they get our sys.path, which lacks the root when pytest is not run by -m."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def cluster(marks: Path) -> Iterator[Cluster]:
    with (
        pytest.MonkeyPatch.context() as patch,
        dask.config.set({"distributed.client.scheduler-info-interval": "5ms"}),  # each empties the client's view
        open_cluster(
            Site(name="test", workers=2), partial(open_fake, marks), slots=1, logs=marks, log_level="INFO"
        ) as cluster,
    ):
        yield cluster
        # Dask kills a worker 4 s after it has asked it to close, and a busy machine takes longer to close its engine.
        patch.setattr(distributed.Nanny.close, "__defaults__", (60, "nanny-close"))
    opened = {file.name.split("-")[1] for file in marks.glob("opened-*")}
    closed = {file.name.split("-")[1] for file in marks.glob("closed-*")}
    assert closed < opened  # all but the killed ones
    assert len(opened - closed) == 2


@pytest.fixture
def client(cluster: Cluster) -> Iterator[distributed.Client]:
    with distributed.Client(cluster.address, security=cluster.security, set_as_default=False) as client:
        yield client


def test_traffic_is_encrypted_and_stays_here(cluster: Cluster, client: distributed.Client) -> None:
    assert cluster.address.startswith("tls://127.0.0.1:")
    assert all(address.startswith("tls://127.0.0.1:") for address in client.nthreads())
    with pytest.raises((OSError, TypeError)):
        distributed.Client(cluster.address, timeout="2s", set_as_default=False)


def test_each_worker_has_one_engine(cluster: Cluster, client: distributed.Client, marks: Path) -> None:
    assert cluster.slots == 2
    answers = client.gather(client.map(engine_and_process, range(8), pure=False))
    assert [(number, engine) for number, engine, _ in answers] == [(number, "fake") for number in range(8)]
    assert {int(file.name.split("-")[1]) for file in marks.glob("opened-*")} == {process for _, _, process in answers}
    assert cluster.news() == [], "workers were missed while they started"


def test_a_worker_is_told_from_one_that_died(cluster: Cluster, client: distributed.Client) -> None:
    (here, _) = client.nthreads()
    assert all(cluster.has(here) for _ in range(300))
    assert not cluster.has("tls://127.0.0.1:1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "1"),
        ("OPENBLAS_NUM_THREADS", "1"),
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("PYTHONSAFEPATH", "1"),
    ],
)
def test_the_environment_of_workers(client: distributed.Client, name: str, value: str) -> None:
    assert client.submit(worker_environment, name).result() == value


def test_a_killed_workers_task_runs_again_with_an_engine(client: distributed.Client, tmp_path: Path) -> None:
    future = client.submit(wait_for_gate, 7, tmp_path, pure=False)
    first = began(tmp_path, 7, set())
    os.kill(first, signal.SIGKILL)
    second = began(tmp_path, 7, {first})
    (tmp_path / "gate").touch()
    assert future.result(timeout=300) == (7, "fake", second)


def test_a_result_that_is_lost_keeps_nobody_waiting(
    client: distributed.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask has it made again, which may take long: who waits for it goes on meanwhile."""
    monkeypatch.setattr("flows.rounds.RESULT_WITHIN", 0.5)
    (tmp_path / "gate").touch()
    future = client.submit(wait_for_gate, 8, tmp_path, pure=False)
    assert future.result(timeout=300)[0] == 8
    (tmp_path / "gate").unlink()
    first = began(tmp_path, 8, set())
    os.kill(first, signal.SIGKILL)
    second = began(tmp_path, 8, {first})
    with pytest.raises(TimeoutError):
        _result(PrefectDaskFuture(task_run_id=uuid.uuid4(), wrapped_future=future))
    (tmp_path / "gate").touch()
    assert future.result(timeout=300) == (8, "fake", second)


def test_a_restarted_worker_has_an_engine(client: distributed.Client) -> None:
    """The nanny's new process opens one before it takes its first task."""
    client.wait_for_workers(2, timeout=300)
    by_worker = {
        address: client.submit(engine_and_process, 0, workers=[address], pure=False).result(timeout=300)
        for address in client.nthreads()
    }
    assert len(by_worker) == 2
    assert all(engine == "fake" for _, engine, _ in by_worker.values())


def test_a_worker_that_went_meanwhile_is_not_restarted(cluster: Cluster) -> None:
    cluster.restart("99")


def test_a_worker_near_its_memory_limit_goes_on(tmp_path: Path) -> None:
    site = Site(name="test", workers=1, memory_gb=1.0)
    with (
        open_cluster(
            site, partial(open_large, tmp_path, 860_000_000), slots=1, logs=tmp_path, log_level="INFO"
        ) as cluster,
        distributed.Client(cluster.address, security=cluster.security, set_as_default=False) as client,
    ):
        _, _, first = client.submit(engine_and_process, 0).result(timeout=300)
        time.sleep(2)  # in which Dask would have paused it
        assert client.submit(engine_and_process, 1).result(timeout=300) == (1, "fake", first)


def test_an_api_that_is_away_is_told_from_a_failure() -> None:
    """Also by a process that asks it for the first time."""
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_SERVER_EPHEMERAL_ENABLED: False}),
        pytest.raises(RuntimeError) as raised,
    ):
        run_task_sync(task(engine_and_process, name="bundle"), parameters={"number": 0})
    assert _is_api_trouble(raised.value)
    assert not _is_api_trouble(EngineError("the GPU fell off the bus"))


def test_an_engine_that_does_not_open_is_an_error_of_the_task(tmp_path: Path) -> None:
    with (
        open_cluster(Site(name="test", workers=1), open_broken, slots=1, logs=tmp_path, log_level="INFO") as cluster,
        distributed.Client(cluster.address, security=cluster.security, set_as_default=False) as client,
        pytest.raises(EngineError, match="no GPU answers on device 3"),
    ):
        client.submit(engine_and_process, 0).result(timeout=300)
    (log,) = tmp_path.glob("*.log")
    assert "the engine can't be opened" in log.read_text()


def test_an_engine_may_take_its_time_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the scheduler waits for a sign of life, which is 5 s at least."""
    monkeypatch.setitem(dask_settings.SETTINGS, "distributed.scheduler.worker-ttl", "1s")
    slow = partial(open_slowly, tmp_path, 9.0)
    with (
        open_cluster(Site(name="test", workers=1), slow, slots=1, logs=tmp_path, log_level="INFO") as cluster,
        distributed.Client(cluster.address, security=cluster.security, set_as_default=False) as client,
    ):
        _, engine, process = client.submit(engine_and_process, 0).result(timeout=300)
    assert engine == "fake"
    assert [file.name for file in tmp_path.glob("opened-*")] == [f"opened-{process}"]  # no other was begun


@pytest.mark.parametrize(
    ("seconds", "within"), [pytest.param(0.0, 300.0, id="quickly"), pytest.param(3600.0, 1.0, id="for ever")]
)
def test_a_block_is_left_while_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, within: float
) -> None:
    """No process of it stays behind, and the end is no error."""
    monkeypatch.setattr("infra.local.LEAVE_WITHIN", within)
    before = worker_processes()
    opener = partial(open_slowly_again, tmp_path, seconds)
    with open_cluster(Site(name="test", workers=1), opener, slots=1, logs=tmp_path, log_level="INFO") as cluster:
        assert isinstance(cluster, LocalWorkers)
        local = cluster.cluster
        (nanny,) = local.workers.values()
        asyncio.run_coroutine_threadsafe(nanny.close(), local.loop.asyncio_loop).result(300)
        wait_for(lambda: [nanny for nanny in list(local._created) if nanny.status == Status.init])
    assert worker_processes() == before


def worker_processes() -> set[int]:
    """Return the worker processes of ours."""
    return {child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())}


def test_a_mapped_flow_runs_on_the_workers(cluster: Cluster, prefect_url: str) -> None:
    wrapped = task(name="ask")(engine_and_process)
    asking = flow(name="asking")(lambda: wrapped.map(range(4)).result())
    answers = asking.with_options(task_runner=task_runner(cluster))()
    assert [(number, engine) for number, engine, _ in answers] == [(number, "fake") for number in range(4)]


def began(folder: Path, number: int, but: set[int]) -> int:
    """Wait for a task to begin in a process not named, and return that."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for file in folder.glob(f"began-{number}-*"):
            process = int(file.name.split("-")[2])
            if process not in but:
                return process
        time.sleep(0.05)
    raise AssertionError("the task has not begun")
