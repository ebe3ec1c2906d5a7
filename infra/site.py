"""Sites: where stages run. A bundled one by name, or a TOML file of the user's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.core.errors import SettingsError
from tasks.settings import checked, read_toml

BUNDLED = Path(__file__).parent / "sites"


class DoradoSite(BaseModel):
    """Where ONT's programs are on this site, and how they are run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: str = Field(
        "dorado_basecall_server", title="Basecall server", description="its path, or its name where PATH finds it"
    )
    program: str = Field("dorado", title="dorado", description="its path, or its name where PATH finds it")
    address: str | None = Field(
        None,
        title="Address of a running server",
        description="ipc:///path or host:port; Shoal then starts none, and ends none",
    )
    port: str = Field("auto", title="Port of servers we start", description="auto, a number, or the path of a socket")
    device: str | None = Field(
        None,
        title="Devices",
        description="e.g. cuda:all, cuda:0,1; none: those that CUDA_VISIBLE_DEVICES names, or all",
    )
    arguments: tuple[str, ...] = Field((), title="Further arguments of the server or program, passed as they are")
    models: Path | None = Field(None, title="Models folder", description="where dorado keeps its models")
    start_within: float = Field(
        900,
        title="Start-up deadline, s",
        gt=0,
        description="a server measures batch sizes on a GPU that it does not know yet, which takes minutes",
    )
    stall_after: float = Field(
        120,
        title="Stall, s",
        gt=0,
        description="a server out of which nothing came for so long, though it has reads, is started again; some "
        "versions wait 30 s for a batch to fill",
    )
    restarts: int = Field(3, title="Restarts", ge=0, le=100, description="of a server that dies or stalls, per worker")


class Site(BaseModel):
    """A place to run: so far, this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(title="Name", min_length=1)
    kind: Literal["local"] = Field("local", title="Kind", description="local: worker processes on this machine")
    workers: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        title="Worker processes",
        ge=1,
        le=1024,
        description="each holds an engine; by default one per CPU core that we may use",
    )
    slots: int | None = Field(
        None,
        title="Slots per worker",
        ge=1,
        le=16,
        description="bundles a worker calls at once; none: as the engine wants",
    )
    memory_gb: float | None = Field(
        None, title="Memory limit per worker, GB", gt=0, description="a worker that exceeds it is restarted"
    )
    scratch: Path | None = Field(
        None, title="Scratch folder", description="for Dask's own files; none: a temporary one"
    )

    dorado: DoradoSite = Field(default_factory=DoradoSite, title="ONT's programs")

    def slots_in_all(self, slots_of_engine: int) -> int:
        """Return how many bundles run at once."""
        return self.workers * (self.slots or slots_of_engine)


def load_site(name: str) -> Site:
    """Load a site by name or by the path of its file.

    Raises:
        SettingsError: there is no such site, or its file is wrong; names the key and what is allowed.
    """
    path = Path(name) if name.endswith(".toml") else BUNDLED / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.toml")))
        raise SettingsError(f"site: {name!r} is neither a site file nor one of the bundled sites: {known}")
    try:
        site: Site = checked(Site, read_toml(path))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    return site
