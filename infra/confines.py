"""What a site allows: folders that a run's settings may name, and modes of the files that it makes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from infra.site import Site, load_site
from tasks.core.errors import SettingsError
from tasks.formats.pod5 import find_pod5
from tasks.settings import CONFINED_TO, RunSettings, whole_path
from tasks.watch_settings import WatchSettings


@contextmanager
def umask_of(site: Site) -> Iterator[None]:
    """Make files and folders with the site's umask; workers started meanwhile inherit it."""
    if site.umask is None:
        yield
        return
    before = os.umask(int(site.umask, 8))
    try:
        yield
    finally:
        os.umask(before)


def confine(settings: RunSettings | WatchSettings) -> None:
    """Refuse settings that name a path outside the roots which their site allows.

    Where the environment's SHOAL_CONFINED_TO names a site with roots, as under `shoal serve`, no other site may be
    named: a site file names programs to run.

    Raises:
        SettingsError: names the field, the path and the roots.
    """
    site = load_site(settings.site)
    if (only := os.environ.get(CONFINED_TO)) and load_site(only).roots and settings.site != whole_path(only):
        raise SettingsError(f"site: {settings.site!r} may not be named here; only {only!r} may")
    if not site.roots:
        return
    roots = [Path(os.path.realpath(root)) for root in site.roots]
    for field, path in _paths(settings):
        # Links are followed: what counts is the file that would be read or written.
        if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
            allowed = ", ".join(map(str, site.roots))
            raise SettingsError(f"{field}: {path} is outside the folders that site {site.name} allows: {allowed}")


def _paths(settings: RunSettings | WatchSettings) -> Iterator[tuple[str, Path]]:
    yield from _paths_of(settings, "")
    if settings.engine.model and os.sep in settings.engine.model:
        yield "engine.model", Path(settings.engine.model)
    if isinstance(settings, RunSettings):
        lists = tuple(path for path in settings.input if path.suffix == ".txt")
        yield from (("input", path) for path in find_pod5(lists))


def _paths_of(model: BaseModel, prefix: str) -> Iterator[tuple[str, Path]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, BaseModel):
                yield from _paths_of(one, f"{prefix}{name}.")
            elif isinstance(one, Path):
                yield f"{prefix}{name}", one
