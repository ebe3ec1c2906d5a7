"""What a person can choose for a watch: fields of the command line, of settings files and of the Prefect form."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tasks.core.watching import StopRules, matches
from tasks.settings import EngineSettings, OutputSettings, RunSettings, SiteName, checked, merged, nameable, read_toml


class RunMatch(BaseModel):
    """Which runs a rule is for: patterns such as FAX*, of which all must match; case is ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flow_cell: str = Field("*", title="Flow cell", description="its id")
    flow_cell_product: str = Field("*", title="Flow cell product", description="e.g. FLO-PRO114M")
    kit: str = Field("*", title="Sequencing kit")
    sample: str = Field("*", title="Sample")
    experiment: str = Field("*", title="Experiment")
    folder: str = Field("*", title="Run folder", description="its whole path")


class RunRule(BaseModel):
    """Settings of their own for some runs; of several rules that match, the first holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: RunMatch = Field(default_factory=RunMatch, title="Match")
    engine: dict[str, Any] = Field({}, title="Engine", description="fields of the engine's settings, e.g. model")
    output: dict[str, Any] = Field({}, title="Output", description="fields of the output's settings, e.g. min_qscore")

    @field_validator("engine", mode="after")
    @classmethod
    def _engine_fits(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _known(EngineSettings, value)

    @field_validator("output", mode="after")
    @classmethod
    def _output_fits(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _known(OutputSettings, value)


class StopSettings(BaseModel):
    """When enough of a run is called; what arrives later is left alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reads: int | None = Field(None, title="Reads", ge=1)
    bases: int | None = Field(None, title="Bases", ge=1)
    seconds: float | None = Field(None, title="Seconds since the run's first file", gt=0)


class WatchSettings(BaseModel):
    """One look at the folders that sequencers write into."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folders: tuple[Path, ...] = Field(
        title="Folders", min_length=1, description="searched for runs: MinKNOW's tree, or any folder of POD5 files"
    )
    out: Path = Field(title="Output folder", description="each run gets a folder in it, in the same tree")
    live: bool = Field(
        True, title="Live", description="call new files while the run goes on; else all of it when it is over"
    )
    settled_for: float = Field(
        30.0, title="Settled, seconds", ge=0, le=86_400, description="size and time of a file must not have changed for"
    )
    idle_after: float = Field(
        7200.0, title="Idle, seconds", gt=0, description="a run without a final_summary is over when nothing came for"
    )
    stop: StopSettings = Field(default_factory=StopSettings, title="Stop rules")
    rules: tuple[RunRule, ...] = Field((), title="Rules", description="settings of their own for some runs")
    attempts: int = Field(3, title="Attempts", ge=1, le=20, description="calls of the same files before giving up")
    deployment: str | None = Field(
        None,
        title="Deployment",
        description="flow/deployment that calls a run, e.g. basecall/local; none: the watch itself",
    )
    site: SiteName = Field("local", title="Site", description="name of a bundled site, or path of a site file (TOML)")
    engine: EngineSettings = Field(default_factory=EngineSettings, title="Engine")
    output: OutputSettings = Field(default_factory=OutputSettings, title="Output")
    batch_samples: int = Field(
        200_000_000, title="Batch, samples", ge=100_000, le=20_000_000_000, description="the unit of work and commit"
    )

    @field_validator("folders", mode="after")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        whole = tuple(map(nameable, value))
        for path in value:
            if not path.is_dir():
                raise ValueError(f"{path} is no folder")
        return tuple(dict.fromkeys(Path(os.path.normpath(path)) for path in whole))

    @field_validator("out", mode="after")
    @classmethod
    def _folder(cls, value: Path) -> Path:
        whole = nameable(value)
        if value.exists() and not value.is_dir():
            raise ValueError(f"{value} is a file; give a folder")
        return Path(os.path.normpath(whole))

    @field_validator("deployment", mode="after")
    @classmethod
    def _named_in_full(cls, value: str | None) -> str | None:
        if value and not re.fullmatch(r"[^/]+/[^/]+", value):
            raise ValueError(f"{value!r} should be flow/deployment, e.g. basecall/local")
        return value

    @property
    def stop_rules(self) -> StopRules:
        return StopRules(reads=self.stop.reads, bases=self.stop.bases, seconds=self.stop.seconds)

    def for_run(self, facts: Mapping[str, str], *, input: tuple[Path, ...], out: Path) -> RunSettings:  # noqa: A002
        """Return the settings by which a run with these facts is called.

        Raises:
            SettingsError: a rule's settings do not go with the others.
        """
        rule = next((rule for rule in self.rules if matches(rule.match.model_dump(), facts)), RunRule())
        settings: RunSettings = checked(
            RunSettings,
            {
                "input": input,
                "out": out,
                "site": self.site,
                "engine": {**self.engine.model_dump(), **rule.engine},
                "output": {**self.output.model_dump(), **rule.output},
                "batch_samples": self.batch_samples,
            },
        )
        return settings


def resolve_watch(*, file: Path | None, command_line: Mapping[str, Any]) -> WatchSettings:
    """Merge settings, defaults < file < command line, and check them.

    Raises:
        SettingsError: names the key's path, the value and what is allowed.
    """
    settings: WatchSettings = merged(WatchSettings, read_toml(file) if file else {}, command_line)
    return settings


def _known(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(values.keys() - model.model_fields)
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; known here: {', '.join(model.model_fields)}")
    return values
