"""The plan: what is in the input, what is done with it in which batch, and what can't be.

The plan is written down before work begins, and only ever grows: a later run over the same input finds the same
batches, whatever was committed in between, and input that came since is cut into batches of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tasks.core.batches import Batch, batch_id, cut, slices_of
from tasks.core.errors import SettingsError
from tasks.core.ledger import first_occurrence
from tasks.core.reads import RunInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run of the input, and whether the engine's model fits it."""

    info: RunInfo
    reads: int
    samples: int
    #: Why the model does not fit this run's chemistry; the empty string when it does.
    refused: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A line of the ledger's file table."""

    path: str
    #: Bytes; 0 where the file can't be read.
    size: int
    reads: int
    samples: int
    #: Reads left out since the same id came earlier in the input.
    duplicates: int
    #: `ok`, `skipped` (nothing of it is called) or `partly` (something of it is not).
    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedReads:
    """The reads of the plan, in input order; every array has shape (reads,) but `read_ids`."""

    #: UUID bytes, uint8, shape (reads, 16); no id comes twice.
    read_ids: npt.NDArray[np.uint8]
    num_samples: npt.NDArray[np.int64]
    #: Index of the run.
    run: npt.NDArray[np.int16]
    #: Index of the file.
    file: npt.NDArray[np.int32]
    #: Row in the file's read table.
    row: npt.NDArray[np.uint32]
    #: Number of the batch; -1 for reads of a run that is refused.
    batch: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What is to be done, and what can't be."""

    runs: tuple[PlannedRun, ...]
    files: tuple[PlannedFile, ...]
    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """A file of the input as the scan found it; one with a `reason` could not be read."""

    path: str
    size: int
    reads: int = 0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """What a scan found. The arrays are as in PlannedReads; ids may come twice."""

    runs: tuple[RunInfo, ...]
    #: Why the model does not fit a run, per run; empty strings where it does.
    refused: tuple[str, ...]
    files: tuple[FoundFile, ...]
    read_ids: npt.NDArray[np.uint8]
    num_samples: npt.NDArray[np.int64]
    run: npt.NDArray[np.int16]
    file: npt.NDArray[np.int32]
    row: npt.NDArray[np.uint32]


def make_plan(found: Found, *, batch_samples: int) -> tuple[Plan, PlannedReads]:
    """Plan a run folder without a plan. Of each read id the first in the input counts, the rest are duplicates."""
    first = first_occurrence(found.read_ids)
    keep = first == np.arange(len(first))
    return _assemble(found, keep, batch_samples)


def extend_plan(
    plan: Plan,
    planned: PlannedReads,
    found: Found,
    *,
    batch_samples: int,
    committed: Collection[str],
    accept_missing: bool = False,
) -> tuple[Plan, PlannedReads]:
    """Go on from a plan: keep its batches as they are, look up where their reads lie now, and add what is new.

    Args:
        accept_missing: Keep reads that are no longer in the input where they were; who reads there quarantines them.

    Raises:
        SettingsError: reads that are planned and not committed are no longer in the input: a file system may be away.
    """
    n = len(planned.read_ids)
    first = first_occurrence(np.concatenate((planned.read_ids, found.read_ids)))[n:]
    known = first < n
    new = first == np.arange(n, n + len(first))
    where = np.full(n, -1, np.int64)
    where[first[known][::-1]] = np.flatnonzero(known)[::-1]  # of several places the first
    gone = where < 0
    waiting = np.array([batch.batch_id not in committed for batch in plan.batches] + [False])  # the last for batch -1
    lost = gone & waiting[planned.batch]
    if lost.any() and not accept_missing:
        path = plan.files[int(planned.file[int(np.argmax(lost))])].path
        whys = (f" ({file.reason}: {file.message})" for file in found.files if file.path == path and file.reason)
        raise SettingsError(
            f"{int(lost.sum())} reads of this run folder's plan that are not called yet are not in the input any more, "
            f"e.g. of {path}{next(whys, '')}; give the input that the run was begun with, or another output folder; or "
            "have them quarantined: --accept-missing"
        )
    counted_here = new.copy()
    counted_here[where[~gone]] = True
    added_plan, added = _assemble(found, new, batch_samples, duplicates=~counted_here)
    runs, run_place = _merged_runs(plan, added_plan)
    files, file_place = _kept_files(plan, added_plan.files, planned.file[gone], planned.file[lost])
    found_at = np.where(gone, 0, where)
    moved_file = np.array([file_place.get(int(old), -1) for old in range(len(plan.files))], np.int32)
    old_file = np.where(gone, moved_file[planned.file], found.file[found_at] if len(found.file) else 0).astype(np.int32)
    old_row = np.where(gone, planned.row, found.row[found_at] if len(found.row) else 0).astype(np.uint32)
    reads = PlannedReads(
        read_ids=np.concatenate((planned.read_ids, added.read_ids)),
        num_samples=np.concatenate((planned.num_samples, added.num_samples)),
        run=np.concatenate((planned.run, run_place[added.run])),
        file=np.concatenate((old_file, added.file)),
        row=np.concatenate((old_row, added.row)),
        batch=np.concatenate((planned.batch, np.where(added.batch < 0, -1, added.batch + len(plan.batches)))).astype(
            np.int32
        ),
    )
    paths = [file.path for file in files]
    order, edges = _by_batch(reads.batch[:n])
    old_batches = (
        tuple(
            replace(batch, slices=slices_of(old_row[rows], old_file[rows], paths))
            for batch, rows in zip(plan.batches, np.split(order, edges), strict=True)
        )
        if plan.batches
        else ()
    )
    new_batches = tuple(replace(batch, number=batch.number + len(plan.batches)) for batch in added_plan.batches)
    infos, refused = [run.info for run in runs], [run.refused for run in runs]
    return Plan(runs=_counted(infos, refused, reads), files=files, batches=old_batches + new_batches), reads


def _kept_files(
    plan: Plan, files: tuple[PlannedFile, ...], gone: npt.NDArray[np.int32], lost: npt.NDArray[np.int32]
) -> tuple[tuple[PlannedFile, ...], dict[int, int]]:
    """Add to the files found those of the plan whose reads were not; also return the place of each of these.

    Args:
        gone: The file in the plan of each planned read that is in no file found.
        lost: Likewise, of those that are not called either.
    """
    grown = list(files)
    by_path = {file.path: place for place, file in enumerate(files)}
    places = {}
    lost_of = np.bincount(lost, minlength=len(plan.files)).tolist()
    for old in sorted(set(gone.tolist())):
        file = plan.files[old]
        place = places[old] = by_path.setdefault(file.path, len(grown))
        if place == len(grown):
            grown.append(file)
        if lost_of[old] and grown[place].status == "ok":
            status = "skipped" if place >= len(files) and lost_of[old] == file.reads else "partly"
            message = f"{lost_of[old]} reads were planned and are not in it any more"
            grown[place] = replace(grown[place], status=status, reason="missing", message=message)
    return tuple(grown), places


def _assemble(
    found: Found, keep: npt.NDArray[np.bool_], batch_samples: int, duplicates: npt.NDArray[np.bool_] | None = None
) -> tuple[Plan, PlannedReads]:
    """Cut the kept reads into batches, and account for every file."""
    duplicates = ~keep if duplicates is None else duplicates
    refused_run = np.array([bool(reason) for reason in found.refused] + [False])
    refused = refused_run[found.run]
    callable_ = keep & ~refused
    batch = np.full(len(keep), -1, np.int32)
    batch[callable_] = cut(found.num_samples[callable_], found.file[callable_], batch_samples)
    reads = PlannedReads(
        read_ids=found.read_ids[keep],
        num_samples=found.num_samples[keep],
        run=found.run[keep],
        file=found.file[keep],
        row=found.row[keep],
        batch=batch[keep],
    )
    paths = [file.path for file in found.files]
    batches = []
    if callable_.any():
        order, edges = _by_batch(reads.batch)
        for number, rows in enumerate(np.split(order, edges)):
            samples = reads.num_samples[rows]
            batches.append(
                Batch(
                    number=number,
                    batch_id=batch_id(reads.read_ids[rows], samples),
                    slices=slices_of(reads.row[rows], reads.file[rows], paths),
                    reads=len(rows),
                    samples=int(samples.sum()),
                )
            )
    count = len(found.files)
    samples_of = np.bincount(found.file, weights=found.num_samples, minlength=count).astype(np.int64)
    duplicates_of = np.bincount(found.file[duplicates], minlength=count)
    refused_of = np.bincount(found.file[refused & ~duplicates], minlength=count)
    run_of_refused = dict(zip(found.file[refused].tolist(), found.run[refused].tolist(), strict=True))
    files = tuple(
        _account(
            file,
            int(samples_of[i]),
            int(duplicates_of[i]),
            int(refused_of[i]),
            found.refused[run_of_refused[i]] if i in run_of_refused else "",
        )
        for i, file in enumerate(found.files)
    )
    runs = _counted(found.runs, found.refused, reads)
    return Plan(runs=runs, files=files, batches=tuple(batches)), reads


def _counted(infos: Sequence[RunInfo], refused: Sequence[str], reads: PlannedReads) -> tuple[PlannedRun, ...]:
    """Count the reads and samples of each run."""
    counts = np.bincount(reads.run, minlength=len(infos)).tolist()
    samples = np.zeros(len(infos), np.int64)
    np.add.at(samples, reads.run, reads.num_samples)  # bincount's weights are floats
    return tuple(
        PlannedRun(info=info, reads=count, samples=total, refused=why)
        for info, count, total, why in zip(infos, counts, samples.tolist(), refused, strict=True)
    )


def _account(file: FoundFile, samples: int, duplicates: int, refused: int, refusal: str) -> PlannedFile:
    """Say what becomes of a file."""
    reason, message = file.reason, file.message
    status = "skipped" if reason else "ok"
    if not reason and (refused or duplicates):
        status = "skipped" if refused + duplicates == file.reads else "partly"
        reason = "wrong_chemistry" if refused else "duplicate_reads"
        notes = [f"{refused} reads: {refusal}"] if refused else []
        notes += [f"{duplicates} reads left out: their ids came earlier in the input"] if duplicates else []
        message = "; ".join(notes)
    return PlannedFile(
        path=file.path,
        size=file.size,
        reads=file.reads,
        samples=samples,
        duplicates=duplicates,
        status=status,
        reason=reason,
        message=message,
    )


def _by_batch(batch: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the reads of batches 0, 1, 2, … one after another, and where each batch but the first begins."""
    order = np.argsort(batch, kind="stable")
    order = order[np.searchsorted(batch[order], 0) :]
    numbers = batch[order]
    return order, np.flatnonzero(np.diff(numbers)) + 1


def _merged_runs(plan: Plan, added: Plan) -> tuple[Sequence[PlannedRun], npt.NDArray[np.int16]]:
    """Join two lists of runs by what tells them apart; also return the place of each run of the second."""
    runs = list(plan.runs)
    place = {run.info.key: i for i, run in enumerate(runs)}
    for run in added.runs:
        if run.info.key not in place:
            place[run.info.key] = len(runs)
            runs.append(run)
    return runs, np.array([place[run.info.key] for run in added.runs] or [0], np.int16)
