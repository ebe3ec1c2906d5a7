"""Reads the heartbeats of a run and acts on the verdicts: restarts what stalls, replaces what is dead."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from infra.cluster import Cluster
from infra.site import Site
from infra.workers import clear_heartbeats, read_heartbeats
from tasks.core.liveness import Beat, Patience, Sighting, Verdict, excuse, gravest, judge, observe

logger = logging.getLogger(__name__)

#: Seconds between looks.
LOOK_EVERY = 2.0
#: Seconds without a look of ours, after which they were a stall of ours, and perhaps of the whole machine: it was
#: suspended, or the flow waited for Prefect's server. A worker that did die then dies a little later by our count.
AWAY = 5.0


class Watchman:
    """Looks after the workers of one split stage, whenever the flow lets it."""

    def __init__(self, folder: Path, cluster: Cluster, site: Site) -> None:
        self._folder = folder
        self._cluster = cluster
        self._patience = Patience(
            late_after=site.late_after,
            dead_after=site.dead_after,
            stall_after=site.stall_after,
            open_after=site.stall_after + site.dorado.start_within,  # who starts a server has a limit of its own
        )
        self._sightings: dict[str, Sighting] = {}
        self._told_late: set[tuple[str, int]] = set()
        #: Processes that stalled, by worker; until a later one of it has answered a read.
        self._restarted: dict[str, int] = {}
        self._looked = -LOOK_EVERY
        self._lost: list[tuple[Beat, ...]] = []

    def lost(self) -> list[tuple[Beat, ...]]:
        """Take what was seen last of the slots of each process that died, hung or stalled since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def look(self) -> Iterator[str]:
        """Judge all slots, act, and yield what was done, in words; at most every few seconds.

        Raises:
            ShoalError: no more workers can come.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY:
            return
        away, self._looked = now - self._looked - LOOK_EVERY, now
        if away > AWAY:
            self._sightings = excuse(self._sightings, seconds=away)
        yield from self._cluster.news()
        self._sightings = observe(self._sightings, read_heartbeats(self._folder), now=now)
        found = gravest(self._sightings, judge(self._sightings, self._patience, now=now))
        self._told_late &= {process for process, (_, verdict) in found.items() if verdict is Verdict.LATE}
        for process, (sighting, verdict) in found.items():
            beat, silent = sighting.beat, now - sighting.changed
            if verdict is Verdict.ALIVE:
                if beat.reads and self._restarted.get(beat.worker, beat.process) != beat.process:
                    del self._restarted[beat.worker]
            elif verdict is not Verdict.STALLED and not self._cluster.has(beat.address):
                # Its process died, Dask has seen it, and another of the same name may be well.
                self._forget(process)
            elif verdict is Verdict.LATE and process not in self._told_late:
                self._told_late.add(process)
                yield f"worker {_place(beat)} is late: no sign of life for {silent:.0f} s"
            elif verdict is Verdict.DEAD:
                yield f"worker {_place(beat)} is dead: no sign of life for {silent:.0f} s; it is replaced"
                self._replace(process)
            elif verdict is Verdict.STALLED:
                what = "no read finished" if beat.ready else "its engine did not open"
                again = beat.worker in self._restarted
                yield (
                    f"worker {_place(beat)} stalls: alive, but {what} for {now - sighting.progressed:.0f} s; "
                    + ("it did before, and is replaced" if again else "its engine is opened anew")
                )
                if again:
                    self._replace(process)
                else:
                    self._restarted[beat.worker] = beat.process
                    self._cluster.restart(beat.worker)
                    self._forget(process)

    def _replace(self, process: tuple[str, int]) -> None:
        worker, _ = process
        self._cluster.replace(worker)
        self._forget(process)
        clear_heartbeats(self._folder, worker)

    def _forget(self, process: tuple[str, int]) -> None:
        beats = {
            key: one.beat for key, one in self._sightings.items() if (one.beat.worker, one.beat.process) == process
        }
        for key in beats:
            del self._sightings[key]
        self._lost.append(tuple(beats.values()))
        clear_heartbeats(self._folder, *process)


def _place(beat: Beat) -> str:
    return f"{beat.worker} on {beat.host}, bundle {beat.bundle}, batch {beat.batch_id or 'none yet'}"
