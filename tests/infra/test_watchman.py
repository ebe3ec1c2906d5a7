"""Looks at real heartbeats, in real time; the workers are names."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from infra.site import Site
from infra.watchman import LOOK_EVERY, Watchman
from infra.workers import Heartbeat


@dataclass
class NamedWorkers:
    """Workers that are there whatever happens; notes which are to be replaced."""

    replaced: list[str] = field(default_factory=list)

    def news(self) -> list[str]:
        return []

    def has(self, address: str) -> bool:
        return True

    def replace(self, worker: str) -> None:
        self.replaced.append(worker)


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
