"""Reads the heartbeats of a run and acts on the verdicts: restarts what stalls, replaces what is dead."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from infra.cluster import Cluster
from infra.site import Site
from infra.workers import clear_heartbeats, read_heartbeats
from tasks.core.liveness import Beat, Patience, Sighting, Verdict, excuse, judge, observe

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
        self._patience = Patience(late_after=site.late_after, dead_after=site.dead_after, stall_after=site.stall_after)
        self._sightings: dict[str, Sighting] = {}
        self._told_late: set[str] = set()
        self._restarted: set[str] = set()
        self._looked = -LOOK_EVERY
        self._lost: list[Beat] = []

    def lost(self) -> list[Beat]:
        """Take what was seen last of the slots that died, hung or stalled since the last call."""
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
        verdicts = judge(self._sightings, self._patience, now=now)
        self._told_late &= {key for key, verdict in verdicts.items() if verdict is Verdict.LATE}
        for key, verdict in verdicts.items():
            sighting = self._sightings[key]
            if verdict is Verdict.ALIVE:
                continue
            silent = now - sighting.changed
            if verdict is not Verdict.STALLED and not self._cluster.has(sighting.beat.address):
                # Its process died, Dask has seen it, and another of the same name may be well.
                self._forget(key, sighting.beat)
            elif verdict is Verdict.LATE and key not in self._told_late:
                self._told_late.add(key)
                yield f"worker {_place(sighting.beat)} is late: no sign of life for {silent:.0f} s"
            elif verdict is Verdict.DEAD:
                yield f"worker {_place(sighting.beat)} is dead: no sign of life for {silent:.0f} s; it is replaced"
                self._replace(sighting.beat)
            elif verdict is Verdict.STALLED:
                idle = now - sighting.progressed
                again = sighting.beat.worker in self._restarted
                yield (
                    f"worker {_place(sighting.beat)} stalls: alive, but no read finished for {idle:.0f} s; "
                    + ("it did before, and is replaced" if again else "its engine is opened anew")
                )
                if again:
                    self._replace(sighting.beat)
                else:
                    self._restarted.add(sighting.beat.worker)
                    self._cluster.restart(sighting.beat.worker)
                    self._forget(key, sighting.beat)

    def _replace(self, beat: Beat) -> None:
        self._lost.append(beat)
        self._cluster.replace(beat.worker)
        clear_heartbeats(self._folder, beat.worker)

    def _forget(self, key: str, beat: Beat) -> None:
        self._lost.append(beat)
        self._sightings.pop(key, None)
        clear_heartbeats(self._folder, beat.worker, beat.process)


def _place(beat: Beat) -> str:
    return f"{beat.worker} on {beat.host}, bundle {beat.bundle}, batch {beat.batch_id or 'none yet'}"
