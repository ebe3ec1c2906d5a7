"""Engines by their settings: what can be known without opening one, and opening one."""

from __future__ import annotations

from importlib.metadata import version

from tasks.core.calls import EngineIdentity
from tasks.core.chemistry import mismatch
from tasks.core.errors import ChemistryError
from tasks.core.reads import RunInfo
from tasks.engines.base import Engine
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tasks.engines.null import NULL_IDENTITY, NULL_MIN_QSCORE, NullEngine
from tasks.settings import EngineSettings, RunSettings


def open_engine(settings: EngineSettings) -> Engine:
    """Open the engine that the settings name."""
    if settings.kind == "null":
        return NullEngine(rate=settings.rate, in_flight_samples=settings.in_flight_samples)
    return CpuEngine(find_model(settings.model), threads=settings.threads, moves=settings.moves, int8=settings.int8)


def identify(settings: EngineSettings) -> EngineIdentity:
    """Tell what would call the reads, without opening it."""
    if settings.kind == "null":
        return NULL_IDENTITY
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
    model = find_model(settings.model)
    if reason := mismatch(run, model.fits, model.name):
        raise ChemistryError(reason)


def min_qscore_of(settings: RunSettings) -> float:
    """Return the mean qscore from which a read passes."""
    if settings.output.min_qscore is not None:
        return settings.output.min_qscore
    return NULL_MIN_QSCORE if settings.engine.kind == "null" else find_model(settings.engine.model).min_qscore


def slots_of(settings: EngineSettings) -> int:
    """Return how many bundles a worker runs at once.

    Two where the engine waits for something else, so that one bundle's tail overlaps the next one's head; one where it
    is the worker's own CPU that calls.
    """
    return 2 if settings.rate else 1


def samples_per_second(settings: EngineSettings) -> float:
    """Return a rough rate of one slot, for estimates."""
    if settings.kind == "null":
        return settings.rate or 2e8
    return find_model(settings.model).samples_per_second * settings.threads
