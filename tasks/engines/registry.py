"""Engines by their settings: what can be known without opening one, and opening one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tasks.core.calls import EngineIdentity
from tasks.core.chemistry import mismatch
from tasks.core.dorado import Patience, default_min_qscore, fits_of, usual_rate
from tasks.core.errors import ChemistryError, EngineError
from tasks.core.reads import RunInfo
from tasks.engines.base import Engine
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tasks.engines.dorado_server import DoradoServerEngine, Server, model_set
from tasks.engines.null import NULL_IDENTITY, NULL_MIN_QSCORE, NullEngine
from tasks.settings import EngineSettings, RunSettings


def open_engine(
    settings: EngineSettings,
    *,
    server: Server | None = None,
    reference: Path | None = None,
    models: Path | None = None,
    patience: Patience | None = None,
) -> Engine:
    """Open the engine that the settings name.

    Args:
        server: Who holds the basecall server, for the engine that needs one; it is closed with the engine.
        reference: FASTA file or index to align to, for engines that align.
        models: Folder in which the site keeps ONT's models.
        patience: How long to wait for a server.
    """
    if settings.kind == "dorado-server":
        if server is None:
            raise EngineError("the engine dorado-server needs a server; infra.engines.open_engine_at gives it one")
        return DoradoServerEngine(settings, server, reference=reference, models=models, patience=patience)
    if settings.kind == "null":
        return NullEngine(rate=settings.rate, in_flight_samples=settings.in_flight_samples)
    return CpuEngine(find_model(settings.model), threads=settings.threads, moves=settings.moves, int8=settings.int8)


def identify(settings: EngineSettings) -> EngineIdentity:
    """Tell what would call the reads, without opening it."""
    if settings.kind == "null":
        return NULL_IDENTITY
    if settings.kind == "dorado-server":
        wanted = model_set(settings)
        # Stride and GPU are the server's to tell, to the workers: they write them with the calls.
        return EngineIdentity(
            engine="dorado-server",
            version=_client_version(),
            model=wanted.name,
            model_digest="",
            stride=0,
            modified_base_models=wanted.mod_names,
        )
    model = find_model(settings.model)
    return EngineIdentity(
        engine="cpu",
        version=version("shoal"),
        model=model.name,
        model_digest=model.digest,
        stride=model.stride,
    )


def check_run(settings: EngineSettings, run: RunInfo) -> None:
    """Raise ChemistryError, naming the run, when the model was not made for this run's chemistry."""
    if settings.kind == "null":
        return
    if settings.kind == "dorado-server":
        name = model_set(settings).name
        fits = fits_of(name)  # a name that tells no chemistry is the person's own choice
        if fits is not None and (reason := mismatch(run, fits, name)):
            raise ChemistryError(reason)
        return
    model = find_model(settings.model)
    if reason := mismatch(run, model.fits, model.name, settings.chemistry):
        raise ChemistryError(reason)


def min_qscore_of(settings: RunSettings) -> float:
    """Return the mean qscore from which a read passes."""
    if settings.output.min_qscore is not None:
        return settings.output.min_qscore
    if settings.engine.kind == "dorado-server":
        return default_min_qscore(model_set(settings.engine).name)
    return NULL_MIN_QSCORE if settings.engine.kind == "null" else find_model(settings.engine.model).min_qscore


def slots_of(settings: EngineSettings) -> int:
    """Return how many bundles a worker runs at once.

    Two where the engine waits for something else, so that one bundle's tail overlaps the next one's head; one where it
    is the worker's own CPU that calls.
    """
    return 2 if settings.rate or settings.kind == "dorado-server" else 1


def samples_per_second(settings: EngineSettings) -> float:
    """Return a rough rate of one slot, for estimates."""
    if settings.kind == "null":
        return settings.rate or 2e8
    if settings.kind == "dorado-server":
        return usual_rate(model_set(settings).name) / slots_of(settings)
    return find_model(settings.model).samples_per_second * settings.threads


def _client_version() -> str:
    try:
        return version("ont-pybasecall-client-lib")
    except PackageNotFoundError:
        return "unknown"  # here; the workers have it
