"""What failed attempts tell: which batch is hard to call, and which worker can't call; no file and no clock.

An attempt that fails or dies leaves a note of each batch of which it had reads. A batch that fails on different workers
is at fault itself; a worker on which different batches fail, while others commit, is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An attempt at a batch that ended without committing it."""

    batch_id: str
    #: Tells one bundle's run on one worker from every other.
    attempt: str
    #: Name of the Dask worker, and the machine or Slurm node that it is on.
    worker: str
    node: str = ""
    #: Of the Dask worker process.
    address: str = ""
    #: Seconds since the epoch, by the worker's clock.
    began: float = 0.0
    #: What was raised; the empty string when the worker died without a word, or is still at it.
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAside:
    """A worker that gets no more bundles, and why."""

    worker: str
    node: str
    batches: int
    cause: str

    def __str__(self) -> str:
        place = f"{self.worker} on {self.node}" if self.node else self.worker
        return f"worker {place}: {self.batches} different batches failed on it; the last cause was: {self.cause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Commits:
    """What one worker has committed."""

    batches: int
    #: Seconds since the epoch: when the last of them was.
    last: float


def times_failed(failures: Iterable[Failure], *, aside: Collection[str] = ()) -> Counter[str]:
    """Count the failed attempts at each batch; those on workers that were set aside are not the batch's fault."""
    return Counter(failure.batch_id for failure in failures if failure.worker not in aside)


def workers_failed_on(failures: Iterable[Failure], batch_ids: Collection[str]) -> set[str]:
    """Return the workers on which any of some batches failed."""
    return {failure.worker for failure in failures if failure.batch_id in batch_ids}


def to_set_aside(
    failures: Sequence[Failure],
    commits: Mapping[str, Commits],
    workers: Collection[str],
    *,
    limit: int,
) -> SetAside | None:
    """Return the worker that is to get no more bundles, if there is one; the worst, for there may be several.

    A worker is at fault when, since it last committed anything, `limit` attempts on it failed at as many different
    batches that failed nowhere else, and another worker committed something. The last worker is never set aside.

    Args:
        failures: Of attempts that are over.
        commits: By worker, since this flow began.
        workers: Those that there are and that are not set aside.
    """
    if len(set(workers)) < 2:
        return None
    places: dict[str, set[str]] = {}
    for failure in failures:
        places.setdefault(failure.batch_id, set()).add(failure.worker)
    found = []
    for worker in sorted(set(workers)):
        if not any(other != worker and other in commits for other in workers):
            continue
        since = commits[worker].last if worker in commits else float("-inf")
        mine = [
            failure
            for failure in failures
            if failure.worker == worker and failure.began > since and len(places[failure.batch_id]) == 1
        ]
        batches = {failure.batch_id for failure in mine}
        if min(len(batches), len({failure.attempt for failure in mine})) >= limit:
            last = max(mine, key=lambda failure: failure.began)
            cause = last.error or "its process died without a word"
            found.append(SetAside(worker=worker, node=last.node, batches=len(batches), cause=cause))
    return max(found, key=lambda one: one.batches, default=None)
