"""`shoal doctor`: what would keep a run from working here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import tasks
from infra.dorado_server import device_of, find_program
from infra.engines import engine_opener, launch_warnings, open_engine_at
from infra.site import Site
from infra.site import address_of as address_at
from tasks.core.dorado import address_of
from tasks.core.errors import SettingsError, ShoalError
from tasks.engines.dorado_program import PROCESSES, program_version
from tasks.engines.dorado_program import find_program as find_dorado
from tasks.engines.dorado_server import (
    DoradoServerEngine,
    ServerReport,
    ask_server,
    library_protocol,
    library_version,
)
from tasks.engines.registry import identify
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
    return [*_installation(), *_engine(site, engine), *_site(site)]


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


def _engine(site: Site, settings: EngineSettings) -> Iterator[Finding]:
    if settings.kind == "dorado-server":
        yield from _dorado_server(site, settings)
        return
    if settings.kind == "dorado":
        yield from _dorado_program(site)
    try:
        identity = identify(settings)
        with TemporaryDirectory() as folder:
            engine_opener(site, settings, reference=None, out=Path(folder), logs=Path(folder))().close()
    except ShoalError as error:
        yield Finding(subject=f"engine {settings.kind}", text=str(error), good=False, fatal=True)
        return
    digest = f", sha256 {identity.model_digest[:12]}…" if identity.model_digest else ""
    yield Finding(subject=f"engine {settings.kind}", text=f"opens; model {identity.model}{digest}")


def _dorado_program(site: Site) -> Iterator[Finding]:
    """Look at ONT's stand-alone program, its models and its devices."""
    try:
        path = find_dorado(site.dorado.program)
        yield Finding(subject="dorado", text=f"{program_version(path)} in {path}")
    except ShoalError as error:
        yield Finding(subject="dorado", text=str(error), good=False, fatal=True)
    yield _program_models(site.dorado.models)
    yield _program_devices(site)
    if site.workers > PROCESSES:
        text = (
            f"{site.workers} for {PROCESSES} processes of dorado, no more run at once; each stages reads on disk, "
            f"so give the site file workers = {PROCESSES} or 1"
        )
        yield Finding(subject="workers", text=text, good=False)


def _program_models(folder: Path | None) -> Finding:
    subject = "dorado models"
    if folder is None:
        text = "the site names no models folder, so dorado downloads its model at every start, from ONT's servers"
        return Finding(subject=subject, text=text, good=False)
    if not folder.is_dir():
        text = f"{folder} is not there; make it, then: dorado download --models-directory {folder} --model NAME"
        return Finding(subject=subject, text=text, good=False, fatal=True)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    text = f"{', '.join(names) or 'none yet'} in {folder}; what is not there, dorado downloads"
    return Finding(subject=subject, text=text, good=bool(names))


def _program_devices(site: Site) -> Finding:
    """List the GPUs that NVIDIA's driver shows, and say which of them dorado is given."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = site.dorado.device or (f"those of CUDA_VISIBLE_DEVICES={visible}" if visible else "what dorado finds")
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        text = f"nvidia-smi shows no GPU here ({error}); dorado is given: {given}"
        return Finding(subject="devices", text=text, good=False)
    gpus = "; ".join(line.strip() for line in asked.stdout.splitlines())
    return Finding(subject="devices", text=f"{gpus}; dorado is given: {given}", good=bool(gpus))


def _dorado_server(site: Site, settings: EngineSettings) -> Iterator[Finding]:
    """Look at library, program or address, GPUs, driver, models; with a model given, start the server and connect."""
    subject = f"engine {settings.kind}"
    try:
        yield Finding(subject="client library", text=f"version {library_version()}, protocol {library_protocol()}")
        if site.dorado.address is None:
            program = find_program(site.dorado.server)
            yield Finding(subject="basecall server", text=f"{program}, devices {device_of(site.dorado)}")
        for warning in launch_warnings(site, settings):
            yield Finding(subject="basecall server", text=warning, good=False)
        yield from _dorado_models(site)
        if settings.model is None and site.dorado.address is None:
            yield Finding(subject=subject, text="give a model to start the server and connect: --model", good=False)
            return
        if site.dorado.address is not None:
            yield from _reported(ask_server(address_of(site.dorado.address)))
        if settings.model is None:
            return
        with TemporaryDirectory() as folder:
            here = Path(folder)
            engine = open_engine_at(site.dorado, settings, reference=None, out=here, logs=here)
            identity = engine.identity
            if isinstance(engine, DoradoServerEngine) and site.dorado.address is None:
                yield from _reported(engine.ask())
            engine.close()
        yield Finding(subject=subject, text=f"connects; model {identity.model}, stride {identity.stride}")
    except (ShoalError, ConnectionError) as error:
        yield Finding(subject=subject, text=str(error), good=False, fatal=True)


def _reported(report: ServerReport) -> Iterator[Finding]:
    """Say what a server tells of itself."""
    yield Finding(
        subject="basecall server",
        text=report.mismatch or f"version {report.version}, protocol {report.protocol}: the library's own",
        good=report.mismatch is None,
        fatal=report.mismatch is not None,
    )
    gpus = ", ".join(report.gpus)
    yield Finding(subject="GPUs", text=gpus or "the server uses none", good=bool(gpus))
    yield Finding(subject="NVIDIA driver", text=report.driver or "not told", good=bool(report.driver))


def _dorado_models(site: Site) -> Iterator[Finding]:
    folder = site.dorado.models
    if folder is None:
        yield Finding(subject="models", text="those that the server has; dorado.models in the site names a folder")
    elif not folder.is_dir():
        yield Finding(subject="models", text=f"{folder} is not there", good=False, fatal=True)
    else:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        yield Finding(subject="models", text=f"{len(names)} in {folder}: {', '.join(names[:5])}", good=bool(names))


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
        yield Finding(subject="address", text=f"workers reach this machine by {address_at(site)}")
    except SettingsError as error:
        yield Finding(subject="address", text=str(error), good=False, fatal=True)
    for line in refused:
        yield Finding(subject=f"site {site.name}", text=line, good=False, fatal=True)
    if not refused:
        kinds = ", ".join(stage for stage, _ in stages(site))
        yield Finding(subject=f"site {site.name}", text=f"up to {most} workers; Slurm would take the jobs of {kinds}")
