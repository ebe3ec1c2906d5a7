"""Sites: where stages run. A bundled one by name, or a TOML file of the user's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tasks.core.errors import SettingsError
from tasks.core.resources import parse_walltime, workers_at_once
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
    port: str = Field(
        "auto",
        title="Port of servers we start",
        description="auto: each takes one that is free; a number or the path of a socket is one server's per machine",
    )
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


class StageResources(BaseModel):
    """What a Slurm job of a stage asks for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(1, title="Threads", ge=1, le=1024)
    memory_per_thread_gb: float = Field(4, title="Memory per thread, GB", gt=0)
    walltime: str = Field(
        "1-00:00:00", title="Walltime", description="dd-hh:mm:ss, hh:mm:ss, mm:ss, or days alone: 1 is a day"
    )
    partition: str | None = Field(None, title="Partition", description="none: the cluster's default one")
    account: str | None = Field(None, title="Account", description="none: the user's default one")
    gres: str | None = Field(None, title="Generic resources", description="e.g. gpu:1, gpu:H100:1, gpu:2")
    extra: tuple[str, ...] = Field((), title="Further options of sbatch", description='e.g. ["--qos=long"]')

    @field_validator("walltime", mode="before")
    @classmethod
    def _days(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("walltime", mode="after")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        try:
            parse_walltime(value)
        except SettingsError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("extra", mode="after")
    @classmethod
    def _one_line_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for line in value:
            if not line.startswith("-") or "\n" in line:
                raise ValueError(f"{line!r} is no option of sbatch; write it with its dashes, without #SBATCH")
        return value

    @property
    def walltime_seconds(self) -> int:
        return parse_walltime(self.walltime)


class PoolResources(StageResources):
    """One kind of worker of the split stage."""

    maximum: int = Field(4, title="Workers at most", ge=1, le=1024)


class SplitResources(PoolResources):
    """The split stage: one kind of worker, or several pools that take bundles from one queue."""

    minimum: int = Field(
        0, title="Workers at least", ge=0, le=1024, description="asked for at once, and kept to the end of the stage"
    )
    total_threads: int = Field(
        0, title="Threads at most, in all workers", ge=0, description="0: no limit; 21 with 7 per worker runs 3 at once"
    )
    bundle_size: int | None = Field(
        None,
        title="Batches per bundle",
        ge=1,
        description="called one after another in one task run; none: as the run's bundle_samples says",
    )
    idle: float = Field(
        60, title="Idle time, s", ge=1, description="a worker that had nothing to do for so long gives its job back"
    )
    drain: float | None = Field(
        None,
        title="Time kept for a worker's last bundle, s",
        ge=0,
        description="before its walltime ends; none: a quarter of the walltime, half an hour at most",
    )
    pools: tuple[PoolResources, ...] = Field(
        (), title="Pools", description="several kinds of workers; what one leaves out is as [split] says"
    )

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:
        """Give each pool what the stage says and it does not."""
        pools = values.get("pools") if isinstance(values, dict) else None
        if isinstance(pools, (list, tuple)) and all(isinstance(pool, dict) for pool in pools):
            common = {key: value for key, value in values.items() if key in PoolResources.model_fields}
            return {**values, "pools": [{**common, **pool} for pool in pools]}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> SplitResources:
        for pool in self.each:
            try:
                workers_at_once(total_threads=self.total_threads, threads=pool.threads, maximum=pool.maximum)
            except SettingsError as error:
                raise ValueError(str(error)) from error
        if self.minimum > self.most_workers:
            raise ValueError(f"minimum: {self.minimum} is more than the {self.most_workers} workers that there may be")
        return self

    @property
    def each(self) -> tuple[PoolResources, ...]:
        """The pools; the stage itself where it names none."""
        return self.pools or (self,)

    @property
    def most_workers(self) -> int:
        """Workers that may run at once, counted by the largest of them where threads are limited."""
        maximum = sum(pool.maximum for pool in self.each)
        threads = max(pool.threads for pool in self.each)
        return workers_at_once(total_threads=self.total_threads, threads=threads, maximum=maximum)


class Site(BaseModel):
    """A place to run: this machine, or a Slurm cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(title="Name", min_length=1)
    kind: Literal["local", "slurm"] = Field(
        "local", title="Kind", description="local: worker processes on this machine; slurm: jobs of a Slurm cluster"
    )
    workers: int = Field(
        default_factory=lambda: len(os.sched_getaffinity(0)),
        title="Worker processes",
        ge=1,
        le=1024,
        description="each holds an engine; by default one per CPU core that we may use; slurm: see [split]",
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
    umask: str | None = Field(
        None,
        title="Umask",
        pattern="^0?[0-7]{3}$",
        description="octal, of all that runs write, e.g. 0027 or 0002; none: that of the user",
    )
    roots: tuple[Path, ...] = Field(
        (),
        title="Roots",
        description="folders in which all paths must lie that settings and deployments' parameters name; none: any",
    )
    interface: str | None = Field(
        None,
        title="Network interface",
        description="slurm: where flow and workers reach each other, e.g. ib0; none: the machine's usual one",
    )
    dashboard: str = Field(
        "127.0.0.1:0", title="Dask's dashboard", description="slurm: host:port it listens on; port 0: any that is free"
    )
    tell_pending_after: float = Field(
        120, title="Pending time, s", gt=0, description="of a Slurm job, after which its reason is told"
    )
    late_after: float = Field(15, title="Late, s", gt=0, description="a worker without a sign of life is shown as late")
    dead_after: float = Field(
        90, title="Dead, s", gt=0, description="a worker without a sign of life is replaced, its bundle called again"
    )
    stall_after: float = Field(
        900, title="Stalled, s", gt=0, description="a live worker that finishes no read has its engine opened anew"
    )

    launch: StageResources | None = Field(
        None, title="Launch", description="slurm: the job that scans and plans; none: done where the flow runs"
    )
    split: SplitResources = Field(default_factory=SplitResources, title="Split", description="slurm: the workers")
    merge: StageResources | None = Field(
        None, title="Merge", description="slurm: the job that writes the result; none: done where the flow runs"
    )
    dorado: DoradoSite = Field(default_factory=DoradoSite, title="ONT's programs")

    @property
    def most_workers(self) -> int:
        """Workers that may run at once."""
        return self.workers if self.kind == "local" else self.split.most_workers

    def slots_in_all(self, slots_of_engine: int) -> int:
        """Return how many bundles run at once."""
        return self.most_workers * (self.slots or slots_of_engine)

    @field_validator("roots", mode="after")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in value:
            if not root.is_absolute():
                raise ValueError(f"{root} is relative; give the whole path")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Site:
        if self.kind == "local":
            for stage in ("launch", "split", "merge"):
                if stage in self.model_fields_set:
                    raise ValueError(f'[{stage}] is for kind = "slurm"; this site is local')
        elif "workers" in self.model_fields_set:
            raise ValueError('workers is for kind = "local"; say [split] maximum')
        if not self.late_after < self.dead_after:
            raise ValueError(f"dead_after: {self.dead_after} is not more than late_after, {self.late_after}")
        return self


def address_of(site: Site) -> str:
    """Return the address of this machine that the site's workers reach it by."""
    if site.kind == "local":
        return "127.0.0.1"
    from distributed.utils import get_ip, get_ip_interface  # not at the top: it costs a second of every command

    try:
        found = get_ip_interface(site.interface) if site.interface else get_ip()  # type: ignore[no-untyped-call]
        return str(found)
    except ValueError as error:
        raise SettingsError(f"site {site.name}: interface: {error}") from error


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
