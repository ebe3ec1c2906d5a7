"""The level that a pore shows for each 9-mer, by the table, by its state, and by what lies about the 9-mer.

The table (uncalled4's) knows nine bases. What lies before and after them moves their level towards the one before or
after, as if it pushed the strand a fraction of a base back or on: two reads of one sequence agree in 0.6 of the
variance that the table leaves. Terms that are linear in the bases about hardly show it (0.03 of that variance), how far
each moves the level towards its neighbours' does (0.15), and a small network that tells how far explains 0.39
(README.md).

Reads also go over, for thousands of bases, into a state in which levels lie off the table's in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.training.reads import KMER, CalledRead, Floats, SegmentedRead, kmers_of, segmented

#: Bases that may matter, counted from the first of the 9-mer.
FIRST, LAST = -8, 18
#: How many ways a level may move (`moves_of`): by a constant, towards the levels next to it, along with the steps
#: between levels further off, in proportion to itself.
MOVES = 7
#: Events of fewer samples tell little of offset and noise; those further off, scaled units, were misaligned.
LONG, FAR = 4, 0.4
#: Events that are judged together, and how far those of the other state lie off (median, in the table's units).
WINDOW, OFF = 300, 0.095
_BLOCK = 1 << 15

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels of 9-mers, in units of the table's standard deviation.

    `tables`, of shape (2, 4**9), are those of the usual state and the other; `loudness` tells how strong the noise is
    within events of each 9-mer. `layers`, weights and biases in turn, with ReLU between, tell from the bases FIRST to
    LAST, one-hot, how far each of the MOVES goes; without any, nothing moves.
    """

    tables: Floats
    loudness: Floats
    layers: list[Floats]

    def of(self, bases: npt.NDArray[np.int8], other: Bools | np.bool_) -> Floats:
        """Return the level of each 9-mer of a sequence, those that are in the `other` state in that one."""
        kmers = kmers_of(bases)
        return self.tables[np.asarray(other, np.int64), kmers] + self.moved(bases, self.tables[0, kmers])

    def moved(self, bases: npt.NDArray[np.int8], level: Floats) -> Floats:
        """Return how far what lies about each 9-mer moves its level."""
        if not self.layers:
            return np.zeros_like(level)
        moves, out = moves_of(level), np.empty_like(level)
        for first in range(0, len(level), _BLOCK):
            here = slice(first, min(first + _BLOCK, len(level)))
            x = surroundings(bases, here)
            for i in range(0, len(self.layers), 2):
                x = (np.maximum(x, 0) if i else x) @ self.layers[i] + self.layers[i + 1]
            out[here] = (x * moves[here]).sum(axis=1)
        return out


def surroundings(bases: npt.NDArray[np.int8], events: slice) -> Floats:
    """Return the bases FIRST to LAST of each event, one-hot, of shape (events, 4 * (LAST - FIRST)); none are zeros."""
    padded = np.full(events.stop - events.start + LAST - FIRST, 4, np.int8)
    first = events.start + FIRST
    known = bases[max(first, 0) : first + len(padded)]
    padded[max(-first, 0) : max(-first, 0) + len(known)] = known
    seen = np.lib.stride_tricks.sliding_window_view(padded, LAST - FIRST)[: events.stop - events.start]
    return np.eye(5, 4, dtype=np.float32)[seen].reshape(len(seen), -1)


def moves_of(level: Floats) -> Floats:
    """Return what each of the MOVES is for each event, of shape (events, MOVES)."""
    near = np.lib.stride_tricks.sliding_window_view(np.pad(level, (3, 2), "edge"), 6)  # 3 before, itself, 2 after
    here = near[:, 3]
    steps = [near[:, 2] - here, near[:, 4] - here, near[:, 1] - near[:, 2], near[:, 5] - near[:, 4]]
    return np.stack([np.ones_like(here), *steps, near[:, 0] - near[:, 1], here], axis=1)


def good(read: SegmentedRead, least: int = LONG) -> Bools:
    """Return which events of a read are long and near enough to their levels to be learnt from."""
    return (read.dwells >= least) & (np.abs(read.offsets) < FAR)


def in_other_state(read: SegmentedRead) -> Bools:
    """Return which events of a read lie in windows whose levels are off."""
    offsets, usable, other = read.offsets / read.gain, good(read), np.zeros(len(read.level), bool)
    for first in range(0, len(other) - WINDOW + 1, WINDOW):
        here = offsets[first : first + WINDOW][usable[first : first + WINDOW]]
        if len(here):
            other[first : first + WINDOW] = np.median(np.abs(here - np.median(here))) > OFF
    return other


def aligned(called: Sequence[CalledRead], states: Sequence[Bools], levels: Levels) -> list[SegmentedRead]:
    """Align reads, each with some events in the other state, with their calls."""
    return [segmented(read, levels.of(read.bases, other)) for read, other in zip(called, states, strict=True)]


def in_both_states(
    called: Sequence[CalledRead], table: Floats, loudness: Floats
) -> tuple[list[SegmentedRead], list[Bools], Levels]:
    """Align reads with their calls; return them, which of their events are in the other state, and both tables.

    The levels of the other state are fitted and the reads aligned by them in turn: by pairs of bases first, then by
    triples. On a read that was not fitted, it brings the standard deviation of that state's offsets from 0.21 to 0.16
    of the levels'; in the usual state that is 0.13.
    """
    reads = [segmented(read, table[kmers_of(read.bases)]) for read in called]
    states = [in_other_state(read) for read in reads]
    levels = Levels(np.stack([table, table]), loudness, [])
    for bases in (2, 2, 3, 3):
        levels = Levels(np.stack([table, table + other_state(reads, states, table, bases)]), loudness, [])
        reads = aligned(called, states, levels)
    return reads, states, levels


def other_state(reads: Sequence[SegmentedRead], states: Sequence[Bools], table: Floats, bases: int) -> Floats:
    """Return by how much the level of each 9-mer changes in the other state: a sum over its runs of so many bases.

    Fitted by ridge regression to the events of all windows in that state.
    """
    numbers: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    changes: list[npt.NDArray[np.float64]] = [np.zeros(0)]
    for read, other in zip(reads, states, strict=True):
        number, here = kmers_of(read.bases), other & good(read)
        numbers.append(number[here])
        changes.append((read.offsets / read.gain + read.level - table[number])[here])
    number, change = np.concatenate(numbers), np.concatenate(changes)
    runs, kinds = KMER - bases + 1, 4**bases

    def columns(of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.stack([(of >> 2 * i) % kinds + kinds * i for i in range(runs)], axis=1)

    seen = np.zeros((len(number), kinds * runs))
    np.put_along_axis(seen, columns(number), 1.0, axis=1)
    weights = np.linalg.solve(seen.T @ seen + 5 * np.eye(seen.shape[1]), seen.T @ change)
    return np.asarray(weights[columns(np.arange(len(table)))].sum(axis=1), np.float32)
