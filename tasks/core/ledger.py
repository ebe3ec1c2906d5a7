"""The proof that every input read has exactly one fate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What comparing the plan's read ids with the ledger's found. Ids are bytes16 rows, uint8, shape (n, 16)."""

    planned: int
    recorded: int
    #: In the plan, not in the ledger.
    missing: npt.NDArray[np.uint8]
    #: In the ledger more than once.
    doubled: npt.NDArray[np.uint8]
    #: In the ledger, not in the plan.
    foreign: npt.NDArray[np.uint8]

    @property
    def holds(self) -> bool:
        """Whether every planned read is recorded once, and nothing else is."""
        return self.planned == self.recorded and not (len(self.missing) or len(self.doubled) or len(self.foreign))


def prove(planned: npt.NDArray[np.uint8], recorded: npt.NDArray[np.uint8]) -> Proof:
    """Compare read ids exactly, all 128 bits, by sorting; ids are UUID bytes, uint8, shape (n, 16).

    Holds about 64 bytes per id besides the arguments; some 150 when the two differ.
    """
    wanted = _sorted(planned)
    found = _sorted(recorded)
    again = np.zeros(len(found), bool)
    again[1:] = (found[1:] == found[:-1]).all(axis=1)
    if not again.any() and np.array_equal(wanted, found):
        none = np.empty((0, 16), np.uint8)
        return Proof(planned=len(planned), recorded=len(recorded), missing=none, doubled=none, foreign=none)
    once = found[~again]
    return Proof(
        planned=len(planned),
        recorded=len(recorded),
        missing=_bytes(wanted[~_contains(once, wanted)]),
        doubled=_bytes(np.unique(found[again], axis=0)),
        foreign=_bytes(once[~_contains(wanted, once)]),
    )


def first_occurrence(read_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return, for each read, the place of the first read of the same id: itself unless it is a duplicate.

    Args:
        read_ids: UUID bytes, uint8, shape (n, 16).

    Returns:
        int64, shape (n,).
    """
    words = _words(read_ids)
    order = _order(words)
    ordered = words[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    leader = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))] if len(order) else order
    first = np.empty(len(order), np.int64)
    first[order] = leader
    return first


def id_order(read_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the places of reads in the order of their ids.

    Args:
        read_ids: UUID bytes, uint8, shape (n, 16).

    Returns:
        int64, shape (n,).
    """
    return _order(_words(read_ids))


def _order(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Sort stably: of equal ids the first in the input comes first."""
    order: npt.NDArray[np.int64] = np.lexsort((words[:, 1], words[:, 0]))
    return order


def _words(read_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """View ids as two 64-bit words each, so that they sort like their text."""
    return np.ascontiguousarray(read_ids).view(">u8").astype(np.uint64).reshape(-1, 2)


def _bytes(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(words.astype(">u8")).view(np.uint8).reshape(-1, 16)


def _sorted(read_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    words = _words(read_ids)
    ordered: npt.NDArray[np.uint64] = words[np.lexsort((words[:, 1], words[:, 0]))]
    return ordered


def _contains(ordered: npt.NDArray[np.uint64], wanted: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Tell which of `wanted` are in `ordered`; both sorted and without duplicates of each other's order."""
    if not len(ordered):
        return np.zeros(len(wanted), bool)
    both = np.concatenate((ordered, wanted))
    source = np.concatenate((np.zeros(len(ordered), bool), np.ones(len(wanted), bool)))
    order = np.lexsort((source, both[:, 1], both[:, 0]))  # of equal ids the one of `ordered` comes first
    merged, from_wanted = both[order], source[order]
    new = np.ones(len(merged), bool)
    new[1:] = (merged[1:] != merged[:-1]).any(axis=1)
    leader = np.maximum.accumulate(np.where(new, np.arange(len(merged)), 0))
    present = ~from_wanted[leader]
    result = np.zeros(len(wanted), bool)
    result[order[from_wanted] - len(ordered)] = present[from_wanted]
    return result
