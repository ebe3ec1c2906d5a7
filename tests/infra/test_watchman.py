"""Looks at real heartbeats, in real time; the workers are names."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.site import Site
from infra.watchman import LOOK_EVERY, Watchman
from infra.workers import Heartbeat
from tasks.formats.workspace import write_json


@dataclass
class NamedWorkers:
    """Workers that are there whatever happens; notes which are to be replaced or restarted."""

    replaced: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)

    def news(self) -> list[str]:
        return []

    def has(self, address: str) -> bool:
        return True

    def replace(self, worker: str) -> None:
        self.replaced.append(worker)

    def restart(self, worker: str) -> None:
        self.restarted.append(worker)


@pytest.mark.parametrize(("away_after", "replaced"), [(60.0, ["w1"]), (0.5, [])], ids=["we looked", "we were away"])
def test_a_silent_worker_is_replaced_unless_the_silence_was_ours(
    away_after: float, replaced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.watchman.AWAY", away_after)
    workers = NamedWorkers()
    site = Site(name="test", late_after=LOOK_EVERY + 0.5, dead_after=LOOK_EVERY + 1)
    watchman = Watchman(tmp_path, workers, site)  # type: ignore[arg-type]
    beating = Heartbeat(tmp_path, "w1", bundle=0)
    (file,) = tmp_path.glob("*.json")
    last = file.read_bytes()
    beating.end()
    file.write_bytes(last)  # as a worker leaves it that is killed
    assert list(watchman.look()) == []
    threading.Event().wait(2 * LOOK_EVERY)
    assert len(list(watchman.look())) == len(replaced)
    assert workers.replaced == replaced


@pytest.mark.parametrize(("reads", "restarts", "replaced"), [(0, 1, ["w1"]), (5, 2, [])], ids=["for good", "once"])
def test_slots_that_stall_together_are_one_stall(
    reads: int, restarts: int, replaced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is opened anew; a worker whose next process stalls, too, before it has answered reads, is replaced."""
    clock = [1000.0]
    monkeypatch.setattr("infra.watchman.time", SimpleNamespace(monotonic=lambda: clock[0]))
    workers = NamedWorkers()
    watchman = Watchman(tmp_path, workers, Site(name="test", stall_after=60))  # type: ignore[arg-type]

    def look(process: int, answered: int) -> None:
        clock[0] += LOOK_EVERY
        beat = {"worker": "w1", "process": process, "batch_id": "", "samples": 0, "ready": True, "time": clock[0]}
        for slot in ("a", "b"):
            write_json(tmp_path / f"w1.{process}.{slot}.json", {**beat, "attempt": slot, "reads": answered})
        list(watchman.look())

    for process in (1, 2):
        look(process, 0)
        while list(tmp_path.glob("*.json")) and clock[0] < 2000:  # seen to stall, it is forgotten
            look(process, reads)
    assert (workers.restarted, workers.replaced) == (["w1"] * restarts, replaced)
    assert [len(slots) for slots in watchman.lost()] == [2, 2]
