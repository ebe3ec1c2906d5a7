"""`shoal doctor`: what would keep a run from working here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tasks
from infra.dorado_program import dorado_program_opener
from infra.site import Site
from tasks.core.errors import ShoalError
from tasks.engines.base import Engine
from tasks.engines.dorado_program import PROCESSES, find_program, program_version
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
    return [*_installation(), *_engine(engine, site), *_site(site)]


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


def _engine(settings: EngineSettings, site: Site) -> Iterator[Finding]:
    if settings.kind == "dorado":
        yield from _dorado_program(site)
    try:
        identity = identify(settings)
        _opener(settings, site)().close()
    except ShoalError as error:
        yield Finding(subject=f"engine {settings.kind}", text=str(error), good=False, fatal=True)
        return
    digest = f", sha256 {identity.model_digest[:12]}…" if identity.model_digest else ""
    yield Finding(subject=f"engine {settings.kind}", text=f"opens; model {identity.model}{digest}")


def _opener(settings: EngineSettings, site: Site) -> Callable[[], Engine]:
    if settings.kind == "dorado":
        return dorado_program_opener(settings, site, reference=None, logs=None)
    return partial(open_engine, settings)


def _dorado_program(site: Site) -> Iterator[Finding]:
    """Look at ONT's stand-alone program, its models and its devices."""
    try:
        path = find_program(site.dorado.program)
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


def _site(site: Site) -> Iterator[Finding]:
    yield Finding(subject=f"site {site.name}", text=f"{site.workers} workers on this machine")
    if site.scratch is not None and not site.scratch.is_dir():
        yield Finding(
            subject="scratch",
            text=f"{site.scratch} is not there; make it, or leave scratch out",
            good=False,
            fatal=True,
        )
