"""Engines on a site: opened in a worker, with what the site has for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from infra.dorado_program import dorado_program_opener
from infra.dorado_server import device_of, open_server
from infra.site import DoradoSite, Site
from tasks.core.dorado import Patience, batch_warning, devices_of, gpu_batch, gpus_of, port_warning
from tasks.engines.base import Engine
from tasks.engines.registry import open_engine, slots_of
from tasks.settings import EngineSettings


def open_engine_at(
    site: DoradoSite, settings: EngineSettings, *, reference: Path | None, out: Path, logs: Path
) -> Engine:
    """Open the engine of a worker.

    Args:
        site: Where ONT's programs are.
        reference: What reads are aligned to.
        out: The run folder: what runs for it on a machine is shared by the workers of one job, and by no other run.
        logs: Folder for logs.
    """
    if settings.kind != "dorado-server":
        return open_engine(settings)
    return open_engine(
        settings,
        server=open_server(site, settings, out=out, logs=logs),
        reference=reference,
        models=site.models,
        patience=Patience(stall=site.stall_after),
    )


def engine_opener(
    site: Site, settings: EngineSettings, *, reference: Path | None, out: Path, logs: Path
) -> Callable[[], Engine]:
    """Return what opens the engine on a worker; it can be pickled. Arguments as above.

    Raises:
        SettingsError: the engine can't do what the settings want.
    """
    if settings.kind == "dorado":
        return dorado_program_opener(settings, site, reference=reference, logs=logs)
    return partial(open_engine_at, site.dorado, settings, reference=reference, out=out, logs=logs)


def launch_warnings(site: Site, settings: EngineSettings) -> list[str]:
    """Say what will make a run slower than it could be on this site, by the numbers."""
    if settings.kind != "dorado-server" or site.dorado.address:
        return []
    # Workers that are Slurm jobs have a server each, and GPUs of their own: those of this machine tell nothing.
    jobs = site.kind == "slurm"
    slots = site.slots or slots_of(settings)
    device = (site.dorado.device or devices_of(None)) if jobs else device_of(site.dorado)
    warnings = [
        port_warning(site.dorado.port, servers=site.most_workers if jobs else 1),
        batch_warning(
            clients=slots if jobs else site.most_workers * slots,
            window=settings.in_flight_samples,
            batch=gpu_batch(site.dorado.arguments, gpus_of(device)),
        )
        if device != "cpu"
        else None,
    ]
    return [warning for warning in warnings if warning]
