"""Engines on a site: opened in a worker, with what the site has for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from infra.dorado_program import dorado_program_opener
from infra.dorado_server import device_of, open_server
from infra.site import DoradoSite, Site
from tasks.core.dorado import Patience, batch_warning, gpu_batch, gpus_of
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
        out: The run folder: what runs for it on a node is shared by the workers there, and by no other run.
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
    device = device_of(site.dorado)
    if device == "cpu":
        return []
    warning = batch_warning(
        clients=site.slots_in_all(slots_of(settings)),
        window=settings.in_flight_samples,
        batch=gpu_batch(site.dorado.arguments, gpus_of(device)),
    )
    return [warning] if warning else []
