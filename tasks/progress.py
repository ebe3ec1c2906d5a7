"""How far a run is, read off its folder: the same for the progress bar, `shoal status`, and the Prefect artifact."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tasks.core.errors import SettingsError
from tasks.core.statistics import covered_seconds
from tasks.formats.commit import committed_ids, read_manifest
from tasks.formats.planfile import read_plan
from tasks.formats.workspace import Workspace
from tasks.metrics import StageFigures, add_up


@dataclass(slots=True, kw_only=True)
class RunProgress:
    """Counts over the committed batches; brought up to date by `Watch.look`."""

    batches: int
    reads: int
    samples: int
    batches_done: int = 0
    reads_done: int = 0
    samples_done: int = 0
    bases: int = 0
    called: int = 0
    skipped: int = 0
    quarantined: int = 0
    #: Seconds since the epoch: when each committed batch began and ended.
    spans: list[tuple[float, float]] = field(default_factory=list)
    metrics: dict[str, StageFigures] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.batches_done == self.batches

    @property
    def percent(self) -> float:
        """Share of the samples that is called and committed, 0 to 100."""
        return 100.0 * self.samples_done / max(self.samples, 1)

    @property
    def busy(self) -> float:
        """Share of the slots' time that went to the engine and to waiting for it, 0 to 1."""
        walls = {stage: figures["wall"] for stage, figures in self.metrics.items() if stage != "committing"}
        return walls.get("calling", 0.0) / (sum(walls.values()) or 1.0)

    @property
    def samples_per_second(self) -> float:
        """Mean rate while batches were called; 0 before there is one."""
        seconds = covered_seconds(self.spans)
        return self.samples_done / seconds if seconds else 0.0


class Watch:
    """Looks at a run folder again and again; reads each plan and each batch's manifest once."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        #: Inode and mtime of the plan's folder, which is another when the run has grown.
        self._version: tuple[int, int] | None = None
        self._planned: set[str] = set()
        self._seen: set[str] = set()
        self._progress: RunProgress | None = None

    def look(self) -> RunProgress | None:
        """Return the progress now, always the same object; None while there is no plan."""
        with suppress(FileNotFoundError, SettingsError):  # none yet, or being replaced: the next look sees the new one
            self._take_plan()
        if self._progress is None:
            return None
        for batch_id in (committed_ids(self._workspace) & self._planned) - self._seen:
            self._seen.add(batch_id)
            _count(self._progress, read_manifest(self._workspace, batch_id))
        return self._progress

    def _take_plan(self) -> None:
        """Bring what is planned up to date, if the plan is another one than at the last look."""
        status = self._workspace.plan.stat()
        version = (status.st_ino, status.st_mtime_ns)
        if version == self._version:
            return
        batches = read_plan(self._workspace).batches
        progress = self._progress or RunProgress(batches=0, reads=0, samples=0)
        progress.batches = len(batches)
        progress.reads = sum(batch.reads for batch in batches)
        progress.samples = sum(batch.samples for batch in batches)
        self._planned = {batch.batch_id for batch in batches}
        self._progress, self._version = progress, version


def _count(progress: RunProgress, manifest: dict[str, Any]) -> None:
    progress.batches_done += 1
    progress.reads_done += manifest["reads"]
    progress.samples_done += manifest["samples"]
    progress.bases += manifest["bases"]
    progress.called += manifest["fates"]["called"]
    progress.skipped += manifest["fates"]["skipped"]
    progress.quarantined += manifest["fates"]["quarantined"]
    progress.spans.append((manifest["began"], manifest["ended"]))
    add_up(progress.metrics, manifest["metrics"])
