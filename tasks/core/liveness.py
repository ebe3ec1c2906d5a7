"""Who is alive: heartbeats in, verdicts out; no file and no clock.

No two clocks are compared: a beat counts as new when it differs from the last one that *we* saw, and ages run on our
own monotonic clock. So neither the clocks of the nodes nor the caches of a network file system matter but by seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """A sign of life, as the file of a slot tells it."""

    #: Name of the Dask worker.
    worker: str
    #: Of the Dask worker process.
    address: str = ""
    host: str = ""
    process: int
    #: Tells this slot's work on one bundle from every other.
    attempt: str = ""
    bundle: int = -1
    batch_id: str
    #: Whether the engine is open: before, no read can be answered.
    ready: bool = False
    #: Reads and samples answered in this bundle.
    reads: int
    samples: int
    #: Seconds since the epoch, by the worker's clock.
    time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A beat, and when we saw it."""

    beat: Beat
    #: Our monotonic seconds: when the beat last changed, and when its reads did, or its engine opened.
    changed: float
    progressed: float


class Verdict(Enum):
    """What becomes of a slot, from the mildest to the gravest."""

    ALIVE = "alive"
    #: No sign of life for a while: shown, nothing else.
    LATE = "late"
    #: Signs of life, but no read is answered, or its engine does not open: it is opened anew.
    STALLED = "stalled"
    #: No sign of life for too long: its worker is replaced.
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Seconds until a slot is late, dead, stalled; `open_after`: stalled while its engine opens."""

    late_after: float
    dead_after: float
    stall_after: float
    open_after: float


def observe(before: Mapping[str, Sighting], beats: Iterable[Beat], *, now: float) -> dict[str, Sighting]:
    """Bring sightings up to date with the beats that are there now; slots without one have nothing to do.

    Args:
        now: Monotonic seconds.
    """
    seen = {}
    for beat in beats:
        key = f"{beat.worker}/{beat.process}/{beat.attempt}"
        last = before.get(key)
        if last is None:
            seen[key] = Sighting(beat=beat, changed=now, progressed=now)
        elif beat != last.beat:
            moved = (beat.reads, beat.ready) != (last.beat.reads, last.beat.ready)
            progressed = now if moved else last.progressed
            seen[key] = Sighting(beat=beat, changed=now, progressed=progressed)
        else:
            seen[key] = last
    return seen


def excuse(sightings: Mapping[str, Sighting], *, seconds: float) -> dict[str, Sighting]:
    """Take time in which we did not look ourselves off the age of what was seen: it says nothing of the workers."""
    return {
        key: replace(last, changed=last.changed + seconds, progressed=last.progressed + seconds)
        for key, last in sightings.items()
    }


def judge(sightings: Mapping[str, Sighting], patience: Patience, *, now: float) -> dict[str, Verdict]:
    """Return the verdict on each slot. A slot that is silent can't be told to stall: dead comes before stalled."""
    return {key: _verdict(sighting, patience, now) for key, sighting in sightings.items()}


def gravest(
    sightings: Mapping[str, Sighting], verdicts: Mapping[str, Verdict]
) -> dict[tuple[str, int], tuple[Sighting, Verdict]]:
    """Return what becomes of each process, by worker and process: what befalls one of its slots befalls all."""
    order = list(Verdict)
    found: dict[tuple[str, int], tuple[Sighting, Verdict]] = {}
    for key, sighting in sightings.items():
        process = sighting.beat.worker, sighting.beat.process
        if process not in found or order.index(verdicts[key]) > order.index(found[process][1]):
            found[process] = sighting, verdicts[key]
    return found


def _verdict(sighting: Sighting, patience: Patience, now: float) -> Verdict:
    silent = now - sighting.changed
    if silent >= patience.dead_after:
        return Verdict.DEAD
    if silent >= patience.late_after:
        return Verdict.LATE
    if now - sighting.progressed >= (patience.stall_after if sighting.beat.ready else patience.open_after):
        return Verdict.STALLED
    return Verdict.ALIVE
