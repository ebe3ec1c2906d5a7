"""`shoal doctor`: what would keep a run from working here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tasks
from infra.site import Site, address_of
from tasks.core.errors import SettingsError, ShoalError
from tasks.engines.registry import identify, open_engine
from tasks.settings import EngineSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at."""

    subject: str
    text: str
    good: bool = True
    #: Nothing will run until it is mended.
    fatal: bool = False


def examine(site: Site, engine: EngineSettings) -> list[Finding]:
    """Look at installation, site and engine."""
    return [*_installation(), *_engine(engine), *_site(site)]


def refuse_site(site: Site) -> None:
    """Raise SettingsError, with Slurm's own reason, when a job of the site could never run."""
    if site.kind == "slurm":
        from infra.slurm_preflight import refusals  # not at the top: Dask costs a second of every command

        if refused := refusals(site):
            raise SettingsError("\n".join(refused))


def _installation() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding(subject="python", text=python)
    yield Finding(subject="shoal", text=f"{version('shoal')} in {Path(tasks.__file__).parents[1]}")
    for package in ("prefect", "prefect-dask", "distributed", "pod5", "polars", "onnxruntime"):
        yield Finding(subject=package, text=version(package))
    fastapi = version("fastapi")
    newer = tuple(map(int, fastapi.split(".")[:2])) >= (0, 151)
    hint = "Prefect's server does not start with it; pip install 'fastapi<0.151'" if newer else fastapi
    yield Finding(subject="fastapi", text=hint, good=not newer, fatal=newer)
    try:
        yield Finding(subject="ont-pybasecall-client-lib", text=version("ont-pybasecall-client-lib"))
    except PackageNotFoundError:
        yield Finding(
            subject="ont-pybasecall-client-lib",
            text="not installed; wanted by `shoal demo` and dorado servers: pip install 'shoal[ont]'",
            good=False,
        )


def _engine(settings: EngineSettings) -> Iterator[Finding]:
    try:
        identity = identify(settings)
        open_engine(settings).close()
    except ShoalError as error:
        yield Finding(subject=f"engine {settings.kind}", text=str(error), good=False, fatal=True)
        return
    digest = f", sha256 {identity.model_digest[:12]}…" if identity.model_digest else ""
    yield Finding(subject=f"engine {settings.kind}", text=f"opens; model {identity.model}{digest}")


def _site(site: Site) -> Iterator[Finding]:
    if site.kind == "slurm":
        yield from _slurm(site)
    else:
        yield Finding(subject=f"site {site.name}", text=f"{site.workers} workers on this machine")
    if site.scratch is not None and not site.scratch.is_dir():
        yield Finding(
            subject="scratch",
            text=f"{site.scratch} is not there; make it, or leave scratch out",
            good=False,
            fatal=True,
        )


def _slurm(site: Site) -> Iterator[Finding]:
    from infra.slurm_preflight import refusals, stages

    most = site.split.most_workers
    try:
        refused = refusals(site)
    except ShoalError as error:
        refused = [str(error)]
    try:
        yield Finding(subject="address", text=f"workers reach this machine by {address_of(site)}")
    except SettingsError as error:
        yield Finding(subject="address", text=str(error), good=False, fatal=True)
    for line in refused:
        yield Finding(subject=f"site {site.name}", text=line, good=False, fatal=True)
    if not refused:
        kinds = ", ".join(stage for stage, _ in stages(site))
        yield Finding(subject=f"site {site.name}", text=f"up to {most} workers; Slurm would take the jobs of {kinds}")
