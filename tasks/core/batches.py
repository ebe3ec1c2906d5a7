"""Batches: the unit of work and of commit; bundles: several batches run one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Rows `start` to `stop` of one POD5 file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Reads that are called and committed together, in input order."""

    #: Place in the plan, from 0.
    number: int
    #: A function of the reads alone: see `batch_id`.
    batch_id: str
    slices: tuple[Slice, ...]
    reads: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Batches that one task run calls one after another, as one stream."""

    number: int
    batches: tuple[Batch, ...]

    @property
    def reads(self) -> int:
        return sum(batch.reads for batch in self.batches)

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.batches)


def batch_id(read_ids: npt.NDArray[np.uint8], num_samples: npt.NDArray[np.int64]) -> str:
    """Name a batch by its input: 20 hex digits of BLAKE2b over ids and lengths.

    The same reads get the same name on any host, in any order of runs, under any path; so a retry, a second run and a
    run after a crash agree on what is committed.

    Args:
        read_ids: UUID bytes, uint8, shape (reads, 16).
        num_samples: int64, shape (reads,).
    """
    digest = blake2b(np.ascontiguousarray(read_ids).tobytes(), digest_size=10)
    digest.update(np.ascontiguousarray(num_samples, dtype="<i8").tobytes())
    return digest.hexdigest()


def cut(
    num_samples: npt.NDArray[np.int64], file_of_read: npt.NDArray[np.int32], batch_samples: int
) -> npt.NDArray[np.int32]:
    """Assign reads to batches, in order: the batch number of each read, int32, shape (reads,).

    A file of more than `batch_samples` is cut into slices of about equal size; smaller files are put together, whole,
    until the next one would make the batch too large.

    Args:
        num_samples: int64, shape (reads,).
        file_of_read: Rising file numbers, int32, shape (reads,).
        batch_samples: Samples per batch.
    """
    batches = np.zeros(len(num_samples), np.int32)
    if not len(num_samples):
        return batches
    edges = np.flatnonzero(np.diff(file_of_read, prepend=file_of_read[0] - 1))
    totals = np.add.reduceat(num_samples, edges)
    number, filled = -1, batch_samples + 1
    for start, stop, total in zip(
        edges.tolist(), [*edges[1:].tolist(), len(num_samples)], totals.tolist(), strict=True
    ):
        if total > batch_samples:
            slices = -(-total // batch_samples)
            ends = np.cumsum(num_samples[start:stop])
            # A read belongs to the slice in which its middle lies; empty slices (one huge read) are closed up.
            middle = ends - num_samples[start:stop] // 2
            slice_of_read = np.minimum(middle * slices // total, slices - 1)
            _, packed = np.unique(slice_of_read, return_inverse=True)
            batches[start:stop] = number + 1 + packed
            number, filled = number + 1 + int(packed.max()), batch_samples + 1
        else:
            if filled + total > batch_samples:
                number, filled = number + 1, 0
            batches[start:stop] = number
            filled += total
    return batches


def slices_of(rows: npt.NDArray[np.uint32], files: npt.NDArray[np.int32], paths: Sequence[str]) -> tuple[Slice, ...]:
    """Write rows, in file order, as the fewest slices."""
    breaks = np.flatnonzero((np.diff(files) != 0) | (np.diff(rows.astype(np.int64)) != 1)) + 1
    starts = np.concatenate(([0], breaks)).tolist()
    stops = np.concatenate((breaks, [len(rows)])).tolist()
    return tuple(
        Slice(file=paths[int(files[lo])], start=int(rows[lo]), stop=int(rows[hi - 1]) + 1)
        for lo, hi in zip(starts, stops, strict=True)
    )


def calling_seconds(batches: Sequence[Batch], *, rate: float, slots: int) -> float:
    """Estimate how long it takes to call batches: until all slots together, or one slot its longest batch, are done.

    Args:
        rate: Samples per second of one slot; 0: unknown, and so is the answer, 0.
    """
    samples = [batch.samples for batch in batches]
    return max(sum(samples) / slots, max(samples, default=0)) / rate if rate else 0.0


def bundle(
    batches: Sequence[Batch], *, bundle_samples: int, slots: int, max_bundles: int, first: int = 0
) -> tuple[Bundle, ...]:
    """Put batches together, in order.

    A bundle has about `bundle_samples`, but less where that would leave slots without work, and more where there would
    be over `max_bundles` of them.
    """
    total = sum(batch.samples for batch in batches)
    size = max(min(bundle_samples, total // (2 * slots)), -(-total // max_bundles), 1)
    groups: list[list[Batch]] = []
    filled = size
    for batch in batches:
        if filled >= size and len(groups) < max_bundles:
            groups.append([])
            filled = 0
        groups[-1].append(batch)
        filled += batch.samples
    return tuple(Bundle(number=first + i, batches=tuple(group)) for i, group in enumerate(groups))
