"""Where a bundle's time goes, stage by stage: wall and CPU seconds, reads and bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TypedDict

#: In the order of the pipeline. What `calling` takes in wall seconds beyond its CPU seconds is waiting for the engine;
#: much `waiting_to_commit` means that the disk is too slow.
STAGES = ("reading", "calling", "formatting", "compressing", "waiting_to_commit", "committing")


class StageFigures(TypedDict):
    """What one stage used."""

    wall: float
    cpu: float
    reads: int
    bytes: int


class Metrics:
    """Figures of one bundle. Each stage belongs to one thread, so nothing is locked."""

    def __init__(self) -> None:
        self._figures: dict[str, StageFigures] = {
            stage: {"wall": 0.0, "cpu": 0.0, "reads": 0, "bytes": 0} for stage in STAGES
        }
        self._told: dict[str, StageFigures] = {}

    def clock(self) -> StageClock:
        """Start a clock for the calling thread."""
        return StageClock(self._figures)

    def since_last(self) -> dict[str, StageFigures]:
        """Return what was used since the last call: what a batch's manifest records."""
        now = {stage: StageFigures(**figures) for stage, figures in self._figures.items()}
        before, self._told = self._told, now
        return {stage: _minus(figures, before.get(stage)) for stage, figures in now.items()}


class StageClock:
    """Attributes a thread's time to stages: each mark gives what passed since the last one to a stage."""

    def __init__(self, figures: dict[str, StageFigures]) -> None:
        self._figures = figures
        self._wall = time.perf_counter()
        self._cpu = time.thread_time()

    def mark(self, stage: str, reads: int = 0, bytes_: int = 0) -> None:
        """Count the time since the last mark, and the reads and bytes given, for `stage`."""
        wall, cpu = time.perf_counter(), time.thread_time()
        figures = self._figures[stage]
        figures["wall"] += wall - self._wall
        figures["cpu"] += cpu - self._cpu
        figures["reads"] += reads
        figures["bytes"] += bytes_
        self._wall, self._cpu = wall, cpu


def add_up(total: dict[str, StageFigures], part: Mapping[str, StageFigures]) -> None:
    """Add a batch's figures to a run's."""
    for stage, figures in part.items():
        here = total.setdefault(stage, {"wall": 0.0, "cpu": 0.0, "reads": 0, "bytes": 0})
        here["wall"] += figures["wall"]
        here["cpu"] += figures["cpu"]
        here["reads"] += figures["reads"]
        here["bytes"] += figures["bytes"]


def _minus(now: StageFigures, before: StageFigures | None) -> StageFigures:
    if before is None:
        return now
    return {
        "wall": now["wall"] - before["wall"],
        "cpu": now["cpu"] - before["cpu"],
        "reads": now["reads"] - before["reads"],
        "bytes": now["bytes"] - before["bytes"],
    }
