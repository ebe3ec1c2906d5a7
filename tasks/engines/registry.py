"""Engines by their settings: what can be known without opening one, and opening one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tasks.core import dorado_program
from tasks.core.calls import EngineIdentity
from tasks.core.chemistry import Fits, mismatch
from tasks.core.dorado import Patience, default_min_qscore, fits_of, usual_rate
from tasks.core.errors import ChemistryError, EngineError, SettingsError
from tasks.core.reads import RunInfo
from tasks.engines import scrappie
from tasks.engines.base import Engine
from tasks.engines.catalogue import Model, find_model
from tasks.engines.cpu import CpuEngine, cpu_identity
from tasks.engines.dorado_program import DoradoProgram, DoradoProgramEngine, check_settings
from tasks.engines.dorado_server import DoradoServerEngine, Server, model_set
from tasks.engines.null import NULL_IDENTITY, NULL_MIN_QSCORE, NullEngine
from tasks.settings import EngineSettings, RunSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is known of a kind of engine by its settings alone."""

    identity: Callable[[EngineSettings], EngineIdentity]
    #: The chemistries it calls, and the model's name; None: it calls any, or finds out by itself.
    fits: Callable[[EngineSettings], tuple[Fits | None, str]]
    min_qscore: Callable[[EngineSettings], float]
    #: A rough rate of all slots of a worker, samples per second.
    rate: Callable[[EngineSettings], float]
    #: Bundles that a worker runs at once: two where the engine waits for something else, so that one bundle's tail
    #: overlaps the next one's head; one where it is the worker's own CPU that calls.
    slots: Callable[[EngineSettings], int] = lambda settings: 1


def _cpu_model(settings: EngineSettings) -> Model:
    model = find_model(settings.model)
    if settings.int8 and model.form != "crf":
        raise SettingsError(f"engine.int8 is for model directories of ONT's; {model.name} is as it is: leave it out")
    return model


def _cpu_fits(settings: EngineSettings) -> tuple[Fits, str]:
    model = _cpu_model(settings)
    return model.fits, model.name


def _cpu_rate(settings: EngineSettings) -> float:
    return _cpu_model(settings).samples_per_second * settings.threads * (1.5 if settings.int8 else 1)


def _server_identity(settings: EngineSettings) -> EngineIdentity:
    """Tell all but stride and GPU, which are the server's to tell, to the workers: they write them with the calls."""
    wanted = model_set(settings)
    try:
        library = version("ont-pybasecall-client-lib")
    except PackageNotFoundError:
        library = "unknown"  # here; the workers have it
    return EngineIdentity(
        engine="dorado-server",
        version=library,
        model=wanted.name,
        model_digest="",
        stride=0,
        modified_base_models=wanted.mod_names,
    )


def _server_fits(settings: EngineSettings) -> tuple[Fits | None, str]:
    name = model_set(settings).name
    return fits_of(name), name  # a name that tells no chemistry is the person's own choice


def _program_model(settings: EngineSettings) -> str:
    return Path(settings.model or dorado_program.DEFAULT_MODEL).name


def _program_identity(settings: EngineSettings) -> EngineIdentity:
    """Tell what is known before the program has run: not its version, nor what it makes of `hac`."""
    return EngineIdentity(engine="dorado", version="", model=_program_model(settings), model_digest="", stride=0)


def _program_fits(settings: EngineSettings) -> tuple[Fits | None, str]:
    """Tell the chemistry in the model's name. Of a complex, dorado chooses the model by the chemistry."""
    check_settings(settings)
    name = _program_model(settings)
    return fits_of(name), name


KINDS = {
    "cpu": Kind(
        identity=lambda settings: cpu_identity(_cpu_model(settings)),
        fits=_cpu_fits,
        min_qscore=lambda settings: _cpu_model(settings).min_qscore,
        rate=_cpu_rate,
    ),
    "null": Kind(
        identity=lambda settings: NULL_IDENTITY,
        fits=lambda settings: (None, NULL_IDENTITY.model),
        min_qscore=lambda settings: NULL_MIN_QSCORE,
        rate=lambda settings: settings.rate or 2e8,
        slots=lambda settings: 2 if settings.rate else 1,
    ),
    "scrappie": Kind(
        identity=lambda settings: scrappie.scrappie_identity(),
        fits=lambda settings: (scrappie.FITS, "scrappie"),
        min_qscore=lambda settings: scrappie.MIN_QSCORE,
        rate=lambda settings: scrappie.SAMPLES_PER_SECOND,
    ),
    "dorado-server": Kind(
        identity=_server_identity,
        fits=_server_fits,
        min_qscore=lambda settings: default_min_qscore(model_set(settings).name),
        rate=lambda settings: usual_rate(model_set(settings).name),
        slots=lambda settings: 2,
    ),
    "dorado": Kind(
        identity=_program_identity,
        fits=_program_fits,
        min_qscore=lambda settings: default_min_qscore(_program_model(settings)),
        rate=lambda settings: dorado_program.samples_per_second(settings.model or dorado_program.DEFAULT_MODEL),
    ),
}


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
    if settings.kind == "dorado":
        return open_dorado_program(settings, DoradoProgram(models=models), reference)
    if settings.kind == "null":
        return NullEngine(rate=settings.rate, in_flight_samples=settings.in_flight_samples)
    if settings.kind == "scrappie":
        return scrappie.ScrappieEngine(trim=settings.trim != "none")
    return CpuEngine(
        find_model(settings.model),
        threads=settings.threads,
        moves=settings.moves,
        int8=settings.int8,
        trim=settings.trim != "none",
    )


def open_dorado_program(settings: EngineSettings, site: DoradoProgram, reference: Path | None) -> Engine:
    """Open ONT's stand-alone program as a site runs it."""
    return DoradoProgramEngine(settings, site, reference=reference)


def identify(settings: EngineSettings) -> EngineIdentity:
    """Tell what would call the reads, without opening it."""
    return KINDS[settings.kind].identity(settings)


def quality_of(settings: EngineSettings, called_by: EngineIdentity) -> str:
    """Say in words what may be expected of calls; empty where we don't know the model that made them."""
    if settings.kind != "cpu":
        return ""
    model = find_model(settings.model)
    return model.quality if model.digest == called_by.model_digest else ""


def check_run(settings: EngineSettings, run: RunInfo) -> None:
    """Raise ChemistryError, naming the run, when the model was not made for this run's chemistry, or nothing can be."""
    if run.sample_rate <= 0:
        raise ChemistryError(
            f"run {run.acquisition_id[:8]} says that it was sampled at {run.sample_rate} Hz, so no times can be told; "
            "write its POD5 files anew with the true rate"
        )
    fits, model = KINDS[settings.kind].fits(settings)
    if fits is not None and (reason := mismatch(run, fits, model, settings.chemistry)):
        raise ChemistryError(reason)


def min_qscore_of(settings: RunSettings) -> float:
    """Return the mean qscore from which a read passes."""
    if settings.output.min_qscore is not None:
        return settings.output.min_qscore
    return KINDS[settings.engine.kind].min_qscore(settings.engine)


def slots_of(settings: EngineSettings) -> int:
    """Return how many bundles a worker runs at once."""
    return KINDS[settings.kind].slots(settings)


def samples_per_second(settings: EngineSettings) -> float:
    """Return a rough rate of one slot, for estimates."""
    kind = KINDS[settings.kind]
    return kind.rate(settings) / kind.slots(settings)
