"""Dask's own settings: in the flow's process, in workers that it starts here, and in those of its jobs."""

from __future__ import annotations

import shlex

#: Results are small and released at once, so a worker's death costs only what it was doing.
SETTINGS: dict[str, object] = {
    "distributed.scheduler.allowed-failures": 3,
    "distributed.scheduler.worker-ttl": "120s",
    "distributed.worker.daemon": True,
    "distributed.admin.tick.limit": "30s",
    "distributed.comm.timeouts.connect": "120s",
    # A worker near its memory limit goes on, until it is over it and restarted: paused, it would wait for ever.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    # What nobody looks at here: it took nine tenths of what a process uses that waits.
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.system-monitor.disk": False,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.worker.profile.enabled": False,
}
#: Environment of worker processes.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
    # Arrow's own pool keeps some 60 MB of what it freed.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def in_flow() -> dict[str, object]:
    """Return the settings of a process that holds a scheduler, and maybe nannies.

    The environment is given by key: what Dask itself sets there, for other BLAS libraries and for giving memory back,
    stays.
    """
    return {**SETTINGS, **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ENVIRONMENT.items()}}


def in_jobs() -> list[str]:
    """Return lines of shell that give the settings to workers which are started elsewhere."""
    names = {f"DASK_{key.replace('.', '__').replace('-', '_').upper()}": value for key, value in SETTINGS.items()}
    return [f"export {name}={shlex.quote(str(value))}" for name, value in {**ENVIRONMENT, **names}.items()]
