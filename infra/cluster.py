"""Site -> Dask cluster and Prefect task runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import distributed
from prefect_dask.task_runners import DaskTaskRunner

from infra.site import Site
from infra.workers import EnginePlugin, LogPlugin
from tasks.engines.base import Engine

#: Dask's own reactions. Results are small and released at once, so a worker's death costs only what it was doing.
DASK_SETTINGS = {
    "distributed.scheduler.allowed-failures": 3,
    "distributed.scheduler.worker-ttl": "120s",
    "distributed.worker.daemon": True,
    "distributed.admin.tick.limit": "30s",
    "distributed.comm.timeouts.connect": "120s",
    # By key: Dask's own, for other BLAS libraries and for giving memory back, stay.
    "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": "1",
    "distributed.nanny.pre-spawn-environ.PYTHONSAFEPATH": "1",
    # Arrow's own pool keeps some 60 MB of what it freed.
    "distributed.nanny.pre-spawn-environ.ARROW_DEFAULT_MEMORY_POOL": "system",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Workers that hold engines."""

    address: str
    #: Bundles that run at the same time.
    slots: int
    security: Any


@contextmanager
def open_cluster(
    site: Site, open_engine: Callable[[], Engine], *, slots: int, logs: Path, log_level: str
) -> Iterator[Cluster]:
    """Start a site's workers, each with an engine of its own, and end them with the block.

    Traffic is encrypted with temporary credentials, and everything listens on loopback only.

    Args:
        open_engine: Picklable by name; called once in each worker, again in each restarted one.
        slots: Bundles per worker, where the site does not say.
        logs: Folder for a log file of each worker.
        log_level: Name of the level from which they are written.
    """
    threads = site.slots or slots
    with (
        dask.config.set(DASK_SETTINGS),
        distributed.LocalCluster(  # type: ignore[no-untyped-call]
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
        client.register_plugin(LogPlugin(logs, log_level))
        client.register_plugin(EnginePlugin(open_engine))
        yield Cluster(address=cluster.scheduler_address, slots=site.workers * threads, security=cluster.security)


def task_runner(cluster: Cluster) -> Any:
    """Return a task runner for a flow. By address: a cluster object is lost when Prefect copies the runner."""
    return DaskTaskRunner(address=cluster.address, client_kwargs={"security": cluster.security})
