"""Site -> Dask cluster and Prefect task runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import dask
import distributed
from prefect_dask.task_runners import DaskTaskRunner

from infra import dask_settings
from infra.local import LOCAL_SETTINGS, LocalCluster
from infra.site import PoolResources, Site, StageResources
from infra.workers import EnginePlugin, LogPlugin, RetirePlugin
from tasks.core.errors import ShoalError
from tasks.engines.base import Engine

if TYPE_CHECKING:
    from infra.slurm import Scaling, SlurmCluster


class Cluster(Protocol):
    """Workers that hold engines, and what a flow can ask of them."""

    @property
    def address(self) -> str:
        """The scheduler's."""

    @property
    def slots(self) -> int:
        """Bundles that run at the same time."""

    @property
    def security(self) -> Any:
        """Credentials for connections to it."""

    def news(self) -> list[str]:
        """Take what happened to workers since the last call, in words. Raises ShoalError when no worker can come."""

    def has(self, address: str) -> bool:
        """Whether a worker process is among us: one that died is soon not, one that hangs is."""

    def replace(self, worker: str) -> None:
        """End a worker that gives no sign of life, and have another in its place."""

    def restart(self, worker: str) -> None:
        """Open a worker's engine anew, in a new process."""

    def set_aside(self, worker: str) -> None:
        """Give a worker no more bundles; it keeps its place, so that nobody else gets its GPU."""

    def keeps(self, worker: str) -> bool:
        """Whether a worker that was set aside still has its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWorkers:
    """Workers on this machine; their nannies are never far."""

    address: str
    slots: int
    security: Any
    cluster: LocalCluster

    def news(self) -> list[str]:
        """Tell which workers did not come back."""
        if self.cluster.trouble:
            raise ShoalError(self.cluster.trouble)
        return self.cluster.news()

    def has(self, address: str) -> bool:
        """Whether Dask counts it as a worker."""
        return address in self.cluster.scheduler.workers  # the client's view of them is now and then empty

    def replace(self, worker: str) -> None:
        """Let its nanny kill the process and make another."""
        self.restart(worker)

    def restart(self, worker: str) -> None:
        """Let its nanny kill the process and make another."""
        self.cluster.restart(worker)

    def set_aside(self, worker: str) -> None:
        """Pause it, and every process that its nanny makes."""
        self.cluster.aside.add(worker)

    def keeps(self, worker: str) -> bool:
        """Whatever becomes of its process."""
        return worker in self.cluster.aside


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmWorkers:
    """Workers that are Slurm jobs."""

    address: str
    slots: int
    security: Any
    cluster: SlurmCluster

    def news(self) -> list[str]:
        """Tell which jobs came, waited, and went."""
        if self.cluster.trouble:
            raise ShoalError(self.cluster.trouble)
        return self.cluster.news()

    def has(self, address: str) -> bool:
        """Whether Dask counts it as a worker."""
        return address in self.cluster.scheduler.workers

    def replace(self, worker: str) -> None:
        """Cancel its job; another is submitted."""
        self.cluster.replace(worker)

    def restart(self, worker: str) -> None:
        """Let its nanny kill the process and make another, in the same job."""
        self.cluster.restart(worker)

    def set_aside(self, worker: str) -> None:
        """Pause it, and keep its job."""
        self.cluster.aside.add(worker)

    def keeps(self, worker: str) -> bool:
        """As long as its job lasts."""
        return bool(self.cluster.job_of(worker))


@contextmanager
def open_cluster(
    site: Site,
    open_engine: Callable[[], Engine],
    *,
    slots: int,
    logs: Path,
    log_level: str,
    run_id: str = "shoal",
) -> Iterator[Cluster]:
    """Start a site's workers, each with an engine of its own, and end them with the block.

    Traffic is encrypted with temporary credentials. On one machine everything listens on loopback only.

    Args:
        open_engine: Picklable by name; called once in each worker, again in each restarted one.
        slots: Bundles per worker, where the site does not say.
        logs: Folder for a log file of each worker; on a cluster, one that all nodes share.
        log_level: Name of the level from which they are written.
        run_id: Name of the jobs, on a cluster.
    """
    threads = site.slots or slots
    plugins: list[distributed.WorkerPlugin] = [LogPlugin(logs, log_level), EnginePlugin(open_engine)]
    if site.kind == "slurm":
        from infra.slurm import Scaling  # not at the top: workers import us, from threads where it can't be

        scaling = Scaling(
            minimum=site.split.minimum,
            maximum=site.split.most_workers,
            slots=threads,
            idle=site.split.idle,
            drain=None if site.split.drain is None else int(site.split.drain),
            tell_pending_after=site.tell_pending_after,
        )
        with _slurm_workers(site, site.split.each, scaling, plugins, logs=logs, run_id=run_id) as workers:
            yield workers
        return
    with (
        dask.config.set({**dask_settings.in_flow(), **LOCAL_SETTINGS}),
        LocalCluster(
            n_workers=site.workers,
            threads_per_worker=threads,
            processes=True,
            security=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=f"{site.memory_gb}GB" if site.memory_gb else 0,
            local_directory=str(site.scratch) if site.scratch else None,
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        for plugin in plugins:
            client.register_plugin(plugin)
        with _opened(
            LocalWorkers(
                address=cluster.scheduler_address,
                slots=site.workers * threads,
                security=cluster.security,
                cluster=cluster,
            )
        ) as workers:
            yield workers


@contextmanager
def open_stage(
    site: Site, resources: StageResources | None, *, logs: Path, log_level: str, run_id: str
) -> Iterator[Cluster | None]:
    """Start one worker without an engine, for launch or merge, as a Slurm job with a stage's resources.

    Without resources there is none: the stage is done where the flow runs.
    """
    if resources is None:
        yield None
        return
    from infra.slurm import Scaling

    pool = PoolResources(**resources.model_dump(), maximum=1)
    scaling = Scaling(minimum=0, maximum=1, slots=1, idle=3600.0, tell_pending_after=site.tell_pending_after)
    with _slurm_workers(site, (pool,), scaling, [LogPlugin(logs, log_level)], logs=logs, run_id=run_id) as workers:
        yield workers


@contextmanager
def _slurm_workers(
    site: Site,
    pools: Sequence[PoolResources],
    scaling: Scaling,
    plugins: Sequence[distributed.WorkerPlugin],
    *,
    logs: Path,
    run_id: str,
) -> Iterator[SlurmWorkers]:
    from infra.slurm import RETIRE_AT, SLURM_SETTINGS, SlurmCluster

    with (
        TemporaryDirectory(dir=logs, prefix=".tls-", ignore_cleanup_errors=True) as secrets,  # nobody else may read it
        dask.config.set({**dask_settings.in_flow(), **SLURM_SETTINGS}),
        SlurmCluster(pools, site, scaling, run_id=run_id, logs=logs, secrets=Path(secrets)) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,  # type: ignore[no-untyped-call]
    ):
        for plugin in [*plugins, RetirePlugin(RETIRE_AT)]:
            client.register_plugin(plugin)
        with _opened(
            SlurmWorkers(
                address=cluster.scheduler_address,
                slots=scaling.maximum * scaling.slots,
                security=cluster.security,
                cluster=cluster,
            )
        ) as workers:
            yield workers


def opened_cluster() -> Cluster | None:
    """Return the cluster in whose block we are.

    Flows find it here: what is a parameter of a flow travels with each of its tasks, and a cluster can't.
    """
    return _CLUSTER.get()


_CLUSTER: ContextVar[Cluster | None] = ContextVar("cluster", default=None)
Workers = TypeVar("Workers", bound=Cluster)


@contextmanager
def _opened(workers: Workers) -> Iterator[Workers]:
    token = _CLUSTER.set(workers)
    try:
        yield workers
    finally:
        _CLUSTER.reset(token)


def task_runner(cluster: Cluster) -> Any:
    """Return a task runner for a flow. By address: a cluster object is lost when Prefect copies the runner."""
    return DaskTaskRunner(address=cluster.address, client_kwargs={"security": cluster.security})
