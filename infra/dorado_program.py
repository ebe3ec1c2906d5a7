"""ONT's stand-alone program as a site has it: what opens the engine `dorado` on a worker."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from infra.site import Site
from tasks.engines.base import Engine
from tasks.engines.dorado_program import DoradoProgram, wanted_of
from tasks.engines.registry import open_dorado_program
from tasks.settings import EngineSettings


def dorado_program_opener(
    settings: EngineSettings, site: Site, *, reference: Path | None, logs: Path | None
) -> Callable[[], Engine]:
    """Return what opens the engine; it is picklable, and called on each worker.

    Args:
        reference: What reads are aligned to.
        logs: Folder for the program's logs.

    Raises:
        SettingsError: the program can't do what the settings want.
    """
    given = site.dorado
    program = DoradoProgram(
        program=given.program,
        device=given.device,
        arguments=given.arguments,
        models=given.models,
        start_within=given.start_within,
        scratch=site.scratch,
        logs=logs,
    )
    wanted_of(settings, program, reference)
    return partial(open_dorado_program, settings, program, reference)
