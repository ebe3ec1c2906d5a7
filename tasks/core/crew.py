"""Workers, by what they did: how much each called, which is slow, which can't call; no file and no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tasks.core.liveness import Beat

#: Failures on one worker, since it last committed anything, after which it gets no more bundles.
FAILURES = 3
#: A worker whose rate is under this share of the median is slow.
SLOW = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a bundle ended on a worker."""

    #: Name of the Dask worker.
    worker: str
    host: str = ""
    #: Ids of the batches that it did not commit; none when all went well.
    failed: frozenset[str] = frozenset()
    cause: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A worker that gets no more bundles, and why."""

    worker: str
    host: str
    failures: int
    cause: str

    def __str__(self) -> str:
        return (
            f"worker {self.worker} on {self.host} is set aside: {self.failures} bundles in a row failed on it that "
            f"failed nowhere else; the last cause was: {self.cause}"
        )


def died(beats: Sequence[Beat], batches: Mapping[int, Collection[str]]) -> Ended | None:
    """Return how a process ended that died, hung or stalled: one failure, however many slots it had.

    Args:
        beats: What its slots told last; none of them is of another process.
        batches: Ids of the batches of each bundle of this flow.

    Returns:
        None when it held no bundle of this flow.
    """
    failed: set[str] = set()
    for beat in beats:
        if beat.bundle in batches:
            failed.update([beat.batch_id] if beat.batch_id else batches[beat.bundle])
    if not failed:
        return None
    cause = "it died or hung without a word"
    return Ended(worker=beats[0].worker, host=beats[0].host, failed=frozenset(failed), cause=cause)


def to_set_aside(
    history: Sequence[Ended], aside: Collection[str], *, gone: Collection[str] = (), most_workers: int
) -> SetAside | None:
    """Return a worker that can't call, where others can; None when there is none.

    It is one on which, since it last committed anything, some bundles failed of which no batch failed elsewhere, while
    another worker that is not set aside has committed some. A batch that fails on different workers is at fault itself.

    Args:
        history: Of this flow, in order.
        aside: Workers that were set aside before.
        gone: Those of them that keep no place any more: others have it.
        most_workers: That there may be at once; the last of them is never set aside.
    """
    if len(set(aside) - set(gone)) + 1 >= most_workers:
        return None
    places: dict[str, set[str]] = {}
    for ended in history:
        for batch_id in ended.failed:
            places.setdefault(batch_id, set()).add(ended.worker)
    well = {ended.worker for ended in history if not ended.failed} - set(aside)
    for worker in sorted({ended.worker for ended in history} - set(aside)):
        own = [ended for ended in history if ended.worker == worker]
        since = max((at + 1 for at, ended in enumerate(own) if not ended.failed), default=0)
        blamed = [ended for ended in own[since:] if all(places[batch_id] == {worker} for batch_id in ended.failed)]
        if (
            len(blamed) >= FAILURES
            and len(frozenset().union(*(ended.failed for ended in blamed))) > 1
            and well - {worker}
        ):
            last = blamed[-1]
            return SetAside(worker=worker, host=last.host, failures=len(blamed), cause=last.cause)
    return None


@dataclass(slots=True, kw_only=True)
class WorkerFigures:
    """What one worker process committed."""

    #: Host and process.
    worker: str
    batches: int = 0
    reads: int = 0
    samples: int = 0
    #: Seconds since the epoch, by its own clock: when its first batch began and its last ended.
    began: float = float("inf")
    ended: float = 0.0
    #: Seconds that its slots worked, added up.
    working: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.ended - self.began, 0.0)

    @property
    def samples_per_second(self) -> float:
        """Rate of one slot while it works: what it waited for work is not its fault."""
        return self.samples / self.working if self.working else 0.0


def figures_of(manifests: Iterable[Mapping[str, Any]]) -> list[WorkerFigures]:
    """Add up batches by worker process; in the order of their names."""
    found: dict[str, WorkerFigures] = {}
    for manifest in manifests:
        figures = found.setdefault(manifest["worker"], WorkerFigures(worker=manifest["worker"]))
        figures.batches += 1
        figures.reads += manifest["reads"]
        figures.samples += manifest["samples"]
        figures.began = min(figures.began, manifest["began"])
        figures.ended = max(figures.ended, manifest["ended"])
        stages = manifest["metrics"].items()
        figures.working += sum(stage["wall"] for name, stage in stages if name != "committing")  # beside the others
    return [found[worker] for worker in sorted(found)]


def slow_workers(figures: Sequence[WorkerFigures]) -> list[WorkerFigures]:
    """Return those that called at less than half the median rate."""
    rates = [one.samples_per_second for one in figures]
    return [one for one in figures if one.samples_per_second < SLOW * median(rates)]
