"""Real reads for training: signal, published calls, and where in the signal each 9-mer of the call lies."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pod5

from infra.training.native import library, pointer

#: Reads of sq_f5c, by the start of their ids, that no training sees, and those that judge a training while it runs.
HELD_OUT = ("a2d0e216", "27a95eec", "98b72b64", "4a3e2e64", "021687eb", "6cdc3e0d")
VALIDATION = ("64a25d50", "666dea1e")
#: Bases in the pore, which set a level, and the one of them whose arrival starts it (uncalled4's table: shift 6).
KMER, NEWEST = 9, 6
_CODE = np.full(256, -1, np.int8)
_CODE[list(b"ACGT")] = range(4)
#: States to either side of a guess that alignment may visit (segment.c: BAND), and its noise and mean dwell.
_HALF_BAND, _DEVIATION, _DWELL = 48, 0.8, 10.0

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class CalledRead:
    """A read with its call: scaled signal, bases 0 to 3, and the sample at which each base arrived, by the moves."""

    read_id: str
    signal: Floats
    bases: npt.NDArray[np.int8]
    arrivals: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SegmentedRead:
    """The stretch of a read whose 9-mers are known, cut into their events.

    Event i shows bases i to i + 8, lies in samples starts[i] to starts[i + 1], and differs by `residuals` (one per
    sample, scaled units) from `offset + gain * level[i]`.
    """

    bases: npt.NDArray[np.int8]
    level: Floats
    starts: npt.NDArray[np.int64]
    residuals: Floats
    offset: float
    gain: float

    @property
    def dwells(self) -> npt.NDArray[np.int64]:
        """How many samples each event lasts."""
        return np.diff(self.starts)

    @property
    def offsets(self) -> npt.NDArray[np.float64]:
        """How far each event's mean lies off its level, scaled units."""
        return np.add.reduceat(self.residuals.astype(float), self.starts[:-1]) / self.dwells


def level_table(path: Path) -> tuple[Floats, Floats]:
    """Read the levels of all 9-mers, in AAAAAAAAA order, standardised, and how loud each is (uncalled4's .npz)."""
    with np.load(path) as table:
        return np.asarray(table["current.mean"], np.float32), np.asarray(table["current_sd.mean"], np.float32)


def kmers_of(bases: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Return the number of the 9-mer that starts at each base, as many as there are."""
    count = len(bases) - KMER + 1
    numbers: npt.NDArray[np.int64] = np.zeros(count, np.int64)
    for j in range(KMER):
        numbers = numbers * 4 + bases[j : j + count]
    return numbers


def scaled(picoampere: Floats) -> Floats:
    """Scale a read's current as tasks/engines/cpu.py does."""
    in_pore = picoampere[(picoampere > 30) & (picoampere < 200)]
    low, high = np.quantile(in_pore, (0.2, 0.9))
    out: Floats = np.clip((picoampere - 0.51 * (low + high)) / (0.53 * (high - low)), -4, 4)
    return out.astype(np.float32)


def sq_f5c(folder: Path) -> list[CalledRead]:
    """Read sq_f5c (hiruna72/squigualiser, MIT): POD5, FASTQ of its calls, and their moves in PAF (tag ss)."""
    lines = (folder / "sq_f5c_reads.truth.fastq").read_text().splitlines()
    calls = {lines[i][1:].split()[0]: lines[i + 1] for i in range(0, len(lines), 4)}
    moves = {}
    for line in (folder / "sq_f5c_reads.moves.paf").read_text().splitlines():
        fields = line.split("\t")
        tag = next(f for f in fields if f.startswith("ss:Z:"))
        moves[fields[0]] = int(fields[2]), np.array(re.findall(r"\d+", tag), np.int64)
    reads = []
    with pod5.Reader(folder / "sq_f5c_reads.pod5") as reader:
        for record in reader.reads():
            name = str(record.read_id)
            if name not in calls or name not in moves:
                continue
            bases = _CODE[np.frombuffer(calls[name].encode(), np.uint8)]
            start, steps = moves[name]
            if len(steps) == len(bases) and (bases >= 0).all():
                arrivals = start + np.concatenate(([0], np.cumsum(steps)))[:-1]
                reads.append(CalledRead(name, scaled(record.signal_pa), bases, arrivals))
    return reads


def segmented(read: CalledRead, level: Floats, rounds: int = 3) -> SegmentedRead:
    """Align a read's signal with the levels of its call's 9-mers, near where the moves put them.

    The moves come in steps of several samples, and lag behind; levels and signal together tell borders to the sample.

    Raises:
        ValueError: the levels can't be brought into the signal; names the read.
    """
    guess = read.arrivals[NEWEST : NEWEST + len(level)]
    first, last = int(guess[0]), int(read.arrivals[NEWEST + len(level)])
    guess, signal = guess - first, read.signal[first:last]
    state = 2 * (np.searchsorted(guess, np.arange(len(signal)), "right") - 1)
    lowest = (state - _HALF_BAND).astype(np.int32)
    starts: npt.NDArray[np.int32] = guess.astype(np.int32)
    stay, step = np.log(1 - 2 / _DWELL), np.log(2 / _DWELL)
    for _ in range(rounds):
        offset, gain = _fit(read, signal, starts, level)
        x = ((signal - offset) / gain).astype(np.float32)
        starts = np.zeros(len(level), np.int32)
        figures = [ctypes.c_float(value) for value in (_DEVIATION, stay, step)]
        failed = library().segment(
            pointer(x), len(x), pointer(level), len(level), *figures, pointer(lowest), pointer(starts)
        )
        if failed:
            raise ValueError(f"read {read.read_id}: its call can't be aligned with its signal ({failed})")
    offset, gain = _fit(read, signal, starts, level)
    borders = np.append(starts, len(signal)).astype(np.int64)
    residuals = signal - (offset + gain * np.repeat(level, np.diff(borders)))
    return SegmentedRead(read.bases, level, borders, residuals.astype(np.float32), offset, gain)


def _fit(read: CalledRead, signal: Floats, starts: npt.NDArray[np.int32], level: Floats) -> tuple[float, float]:
    """Return offset and gain that bring levels to the events' means; events far off their level don't count."""
    ends = np.append(starts[1:], len(signal))
    sums = np.concatenate(([0.0], np.cumsum(signal, dtype=np.float64)))
    means = (sums[ends] - sums[starts]) / np.maximum(ends - starts, 1)
    near = ends - starts > 2
    offset, gain = 0.0, 1.0
    for _ in range(3):
        if near.sum() < 10:
            raise ValueError(f"read {read.read_id}: its call's levels are not those of its signal")
        forth, back = np.polyfit(level[near], means[near], 1), np.polyfit(means[near], level[near], 1)
        gain = float(np.sqrt(forth[0] / back[0]))  # both err: neither regression's slope, but the one between
        offset = float(means[near].mean() - gain * level[near].mean())
        near = (ends - starts > 2) & (np.abs(means - offset - gain * level) < gain)
    return offset, gain
