"""Engines by their settings: what can be known without opening one, and opening one."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from tasks.core import dorado_program
from tasks.core.calls import EngineIdentity
from tasks.core.chemistry import mismatch
from tasks.core.dorado import default_min_qscore, fits_of
from tasks.core.errors import ChemistryError
from tasks.core.reads import RunInfo
from tasks.engines import scrappie
from tasks.engines.base import Engine
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tasks.engines.dorado_program import DoradoProgram, DoradoProgramEngine, check_settings
from tasks.engines.null import NULL_IDENTITY, NULL_MIN_QSCORE, NullEngine
from tasks.settings import EngineSettings, RunSettings


def open_engine(settings: EngineSettings) -> Engine:
    """Open the engine that the settings name."""
    if settings.kind == "null":
        return NullEngine(rate=settings.rate, in_flight_samples=settings.in_flight_samples)
    if settings.kind == "scrappie":
        return scrappie.ScrappieEngine()
    if settings.kind == "dorado":
        return open_dorado_program(settings, DoradoProgram(), None)
    return CpuEngine(find_model(settings.model), threads=settings.threads, moves=settings.moves, int8=settings.int8)


def identify(settings: EngineSettings) -> EngineIdentity:
    """Tell what would call the reads, without opening it."""
    if settings.kind == "null":
        return NULL_IDENTITY
    if settings.kind == "scrappie":
        return scrappie.scrappie_identity()
    if settings.kind == "dorado":
        return _dorado_program_identity(settings)
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
    if settings.kind == "scrappie":
        fits, name = scrappie.FITS, "scrappie"
    else:
        model = find_model(settings.model)
        fits, name = model.fits, model.name
    if reason := mismatch(run, fits, name, settings.chemistry):
    if settings.kind == "dorado":
        _check_dorado_program_run(settings, run)
        return
    model = find_model(settings.model)
    if reason := mismatch(run, model.fits, model.name, settings.chemistry):
        raise ChemistryError(reason)


def min_qscore_of(settings: RunSettings) -> float:
    """Return the mean qscore from which a read passes."""
    if settings.output.min_qscore is not None:
        return settings.output.min_qscore
    if settings.engine.kind == "scrappie":
        return scrappie.MIN_QSCORE
    if settings.engine.kind == "dorado":
        return default_min_qscore(Path(settings.engine.model or dorado_program.DEFAULT_MODEL).name)
    return NULL_MIN_QSCORE if settings.engine.kind == "null" else find_model(settings.engine.model).min_qscore


def slots_of(settings: EngineSettings) -> int:
    """Return how many bundles a worker runs at once.

    Two where the engine waits for something else, so that one bundle's tail overlaps the next one's head; one where it
    is the worker's own CPU that calls.
    """
    return 2 if settings.rate or settings.kind == "dorado" else 1


def samples_per_second(settings: EngineSettings) -> float:
    """Return a rough rate of one slot, for estimates."""
    if settings.kind == "null":
        return settings.rate or 2e8
    if settings.kind == "scrappie":
        return scrappie.SAMPLES_PER_SECOND
    if settings.kind == "dorado":
        return dorado_program.samples_per_second(settings.model or dorado_program.DEFAULT_MODEL)
    return find_model(settings.model).samples_per_second * settings.threads


def open_dorado_program(settings: EngineSettings, site: DoradoProgram, reference: Path | None) -> Engine:
    """Open ONT's stand-alone program as a site runs it."""
    return DoradoProgramEngine(settings, site, reference=reference)


def _dorado_program_identity(settings: EngineSettings) -> EngineIdentity:
    """Tell what is known before the program has run: not its version, nor what it makes of `hac`."""
    model = Path(settings.model or dorado_program.DEFAULT_MODEL).name
    return EngineIdentity(engine="dorado", version="", model=model, model_digest="", stride=0)


def _check_dorado_program_run(settings: EngineSettings, run: RunInfo) -> None:
    """Compare with the chemistry in the model's name. Of a complex, dorado chooses the model by the chemistry."""
    check_settings(settings)
    model = Path(settings.model or dorado_program.DEFAULT_MODEL).name
    fits = fits_of(model)
    if fits is not None and (reason := mismatch(run, fits, model)):
        raise ChemistryError(reason)
