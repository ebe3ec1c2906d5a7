"""Squiggles of new sequences in the time and noise of real reads: what the network learns from.

A few reads are all there is, and a network soon knows them by heart. Their time and noise, though, hardly depend on
what was sequenced: cut into events (reads.py), a read is a level per 9-mer, how long each event lasts, how far it lies
off its level, and the noise within it. A chunk here draws each of the last three from real reads and puts levels of a
new sequence under them. Some chunks are stretches of a read as it is, but for some bases.

Difficulty goes from 0 (every base takes as long, no noise) to 1 (as the reads are), for dwells and noise apart. What a
level says of its nine bases is learnt where it is easy to see; a network that starts at 1 takes many times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.training.reads import KMER, NEWEST, Floats, SegmentedRead, kmers_of

#: Of the 9-mer's bases those that the auxiliary loss asks for: the first, and how many.
FIRST_AUX, AUX = 2, 7
#: Samples per chunk unless told otherwise, and per CTC frame.
SAMPLES, STRIDE = 2004, 3
#: Levels of neighbours this far apart, in the table's units, leave no doubt where an event begins and ends.
PLAIN = 0.8
#: Events of fewer samples tell little of offset and noise; those further off, scaled units, were misaligned.
LONG, FAR = 4, 0.4
#: Impulse response of the amplifier's filter at 4 kHz, beside the averaging over a sample.
RESPONSE = np.array([0.06, 0.88, 0.06])
#: Noise and offsets are in part what alignment got wrong: with this share of them, differences between samples are
#: distributed as in reads, and new sequences are as hard as reads.
STRENGTH = 0.85
#: Reads go over, for thousands of bases, into a state in which levels lie off the table's in another way: the events
#: judged together, how far they then lie off (median, in the table's units), and the share of chunks in that state.
WINDOW, OFF, OTHER_STATE = 300, 0.095, 0.15
#: Share of bases that change in a chunk that keeps its sequence, at most: else that is learnt by heart.
MUTATIONS = 0.1
#: Bases that a new base of a made-up genome depends on.
_ORDER = 5


@dataclass(frozen=True, slots=True)
class Chunks:
    """A batch for the network.

    `signal` is float32 of shape (chunks, samples), scaled as tasks/engines/cpu.py scales it; `labels` one int32 array
    per chunk, 1 to 4 for ACGT; `context` int64 of shape (chunks, samples / STRIDE, AUX), 0 to 3.
    """

    signal: Floats
    labels: list[npt.NDArray[np.int32]]
    context: npt.NDArray[np.int64]


class Simulator:
    """Draws chunks of any difficulty from segmented reads and a level table."""

    def __init__(
        self, reads: Sequence[SegmentedRead], table: Floats, *, kept: float, seed: int, samples: int = SAMPLES
    ) -> None:
        """Set what chunks are made of, `samples` each; `kept` is the share of them that keep their own sequence."""
        self._samples = samples
        self._reads = [read for read in reads if len(read.residuals) > 3 * samples]
        self._weights = np.array([len(read.residuals) for read in self._reads], float)
        self._weights /= self._weights.sum()
        self._dwells = np.concatenate([plain_dwells(read, table) for read in self._reads])
        self._noises = [noise_of(read) for read in self._reads]
        self._tables = table, table + other_state(reads, table)
        self._kept = kept
        self._genome = made_up_genome([read.bases for read in reads], np.random.default_rng(seed))

    def draw(self, chunks: int, difficulty: tuple[float, float], rng: np.random.Generator) -> Chunks:
        """Draw `chunks` chunks, each of some difficulty of dwells and some of noise between the two given."""
        frames = self._samples // STRIDE
        signal = np.empty((chunks, self._samples), np.float32)
        context = np.empty((chunks, frames, AUX), np.int64)
        labels = []
        for i in range(chunks):
            uneven, noisy = rng.uniform(*difficulty, 2)
            signal[i], label, context[i] = self._chunk(uneven, noisy, rng)
            labels.append(label)
        return Chunks(signal, labels, context)

    def _chunk(
        self, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[Floats, npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        number = int(rng.choice(len(self._reads), p=self._weights))
        draw = self._keep if rng.random() < self._kept else self._make
        signal, bases, event = draw(number, 10 * np.exp(uneven * rng.normal(0, 0.12)), uneven, noisy, rng)
        signal += noisy * rng.uniform(0, 0.05) * rng.standard_normal(self._samples)
        signal = signal * (1 + noisy * rng.normal(0, 0.04)) + noisy * rng.normal(0, 0.05)
        middles = np.arange(self._samples // STRIDE) * STRIDE + STRIDE // 2
        context = bases[event[middles][:, None] + FIRST_AUX + np.arange(AUX)].astype(np.int64)
        label = (bases[NEWEST + 1 : NEWEST + event[-1] + 1] + 1).astype(np.int32)
        return np.clip(signal, -4, 4).astype(np.float32), label, context

    def _make(
        self, number: int, mean: float, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Make signal of a new sequence; return it, the bases, and of each sample the event."""
        read, (offsets, noise) = self._reads[number], self._noises[number]
        count = self._samples // 2
        dwell = mean * rng.choice(self._dwells, count) ** uneven * rng.lognormal(0, 0.1 * uneven, count)
        borders = np.concatenate(([0.0], np.cumsum(dwell))) - dwell[0] * rng.random()
        bases = self._sequence(count + KMER - 1, rng)
        strength = STRENGTH * noisy * np.exp(noisy * rng.normal(0, 0.2))
        table = self._tables[int(rng.random() < OTHER_STATE)]
        level = read.offset + read.gain * table[kmers_of(bases)] + strength * rng.choice(offsets, count)
        # Each sample is the average current of its time, whatever changes within it.
        charge = np.concatenate(([0.0], np.cumsum(level * dwell)))
        signal = np.diff(np.interp(np.arange(-1, self._samples + 2), borders, charge))
        signal = np.convolve(signal, RESPONSE, "valid")
        start = int(rng.integers(0, len(noise)))
        signal += strength * np.take(noise, np.arange(start, start + self._samples), mode="wrap")
        return signal, bases, np.searchsorted(borders, np.arange(self._samples), "right") - 1

    def _keep(
        self, number: int, mean: float, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Take a stretch of a read with its own sequence, of which some bases change; return as `_make` does."""
        read = self._reads[number]
        events = len(read.starts) - 1
        while True:
            first = int(rng.integers(0, events - 20))
            old = read.starts[first : first + self._samples // 2 + 1]
            lasted = np.diff(old)
            dwell = mean * (lasted / lasted.mean()) ** uneven * rng.lognormal(0, 0.1 * uneven, len(lasted))
            borders = np.concatenate(([0.0], np.cumsum(dwell))) - dwell[0] * rng.random()
            if borders[-1] > self._samples:
                break
        bases = mutated(read.bases[first : first + len(lasted) + KMER - 1], rng)
        places = np.arange(self._samples)
        event = np.searchsorted(borders, places, "right") - 1
        source = np.interp(places, borders, old).astype(np.int64)
        level = read.offset + read.gain * self._tables[0][kmers_of(bases)]
        return level[event] + noisy * read.residuals[source], bases, event

    def _sequence(self, length: int, rng: np.random.Generator) -> npt.NDArray[np.int8]:
        """Return a stretch of the made-up genome, or random sequence of some GC content with repeats put in."""
        if rng.random() < 0.6:
            start = int(rng.integers(0, len(self._genome) - length))
            return self._genome[start : start + length]
        gc = rng.uniform(0.3, 0.7)
        made = rng.choice(4, length, p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2]).astype(np.int8)
        for _ in range(int(rng.integers(0, 8))):
            unit = int(rng.choice([1, 1, 1, 2, 3, 4]))
            start = int(rng.integers(0, length - 40))
            stop = start + unit * int(rng.integers(3, 10))
            made[start:stop] = np.resize(made[start : start + unit], stop - start)
        return made


def plain_dwells(read: SegmentedRead, table: Floats) -> npt.NDArray[np.float64]:
    """Return how long peaks and valleys of a read last, in units of its mean dwell.

    Of other events alignment can't tell to the sample where they end, and leaves many as short as it may.
    """
    level, dwell = table[kmers_of(read.bases)], np.diff(read.starts)
    level = level[: len(dwell)]
    before, after = level[1:-1] - level[:-2], level[1:-1] - level[2:]
    plain = (np.minimum(before, after) > PLAIN) | (np.maximum(before, after) < -PLAIN)
    return dwell[1:-1][plain] / dwell.mean()


def noise_of(read: SegmentedRead) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how far a read's events lie off their levels, and the noise within them, one event after the other."""
    dwell = np.diff(read.starts)
    offset = np.add.reduceat(read.residuals.astype(float), read.starts[:-1]) / dwell
    good = (dwell >= LONG) & (np.abs(offset) < FAR)
    within = np.repeat(good, dwell)
    within[read.starts[:-1]] = within[read.starts[1:] - 1] = False  # borders lie amid these
    return offset[good], (read.residuals - np.repeat(offset, dwell))[within]


def other_state(reads: Sequence[SegmentedRead], table: Floats) -> Floats:
    """Return by how much the level of each 9-mer changes in the other state: a sum over its pairs of neighbours.

    Fitted by ridge regression to the events of all windows in that state. On a read that was not fitted, it brings
    their standard deviation from 0.21 to 0.16 of the levels'; in the usual state that is 0.13.
    """
    numbers, offsets = [np.zeros(0, np.int64)], [np.zeros(0)]
    for read in reads:
        dwell = np.diff(read.starts)
        offset = np.add.reduceat(read.residuals.astype(float), read.starts[:-1]) / dwell / read.gain
        number = kmers_of(read.bases)[: len(dwell)]
        for first in range(0, len(dwell) - WINDOW + 1, WINDOW):
            here = np.arange(first, first + WINDOW)
            here = here[(dwell[here] >= LONG) & (np.abs(offset[here]) < 0.6)]
            if len(here) and np.median(np.abs(offset[here] - np.median(offset[here]))) > OFF:
                numbers.append(number[here])
                offsets.append(offset[here])
    number, offset = np.concatenate(numbers), np.concatenate(offsets)
    shifts = range(0, 2 * (KMER - 1), 2)
    pairs = np.stack(
        [(number >> shift) % 16 + 8 * shift for shift in shifts], axis=1
    )  # one of 16 columns for each pair
    seen = np.zeros((len(number), 16 * (KMER - 1)))
    np.put_along_axis(seen, pairs, 1.0, axis=1)
    weights = np.linalg.solve(seen.T @ seen + 3 * np.eye(seen.shape[1]), seen.T @ offset)
    every = np.arange(len(table))
    change = np.sum([weights[(every >> shift) % 16 + 8 * shift] for shift in shifts], axis=0)
    return np.asarray(change, np.float32)


def mutated(bases: npt.NDArray[np.int8], rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """Return bases of which up to MUTATIONS are drawn anew."""
    drawn = rng.random(len(bases)) < rng.uniform(0, MUTATIONS)
    return np.where(drawn, rng.integers(0, 4, len(bases)), bases).astype(np.int8)


def made_up_genome(
    sequences: Sequence[npt.NDArray[np.int8]], rng: np.random.Generator, chains: int = 1000, length: int = 4000
) -> npt.NDArray[np.int8]:
    """Return chains * length bases that follow each other as in the sequences and their reverse complements.

    A Markov chain of order 5: what two strands of a genome have in common, and nothing to be learnt by heart.
    """
    counts = np.ones((4**_ORDER, 4))
    for one in sequences:
        for strand in (one, 3 - one[::-1]):
            state: npt.NDArray[np.int64] = np.zeros(len(strand) - _ORDER, np.int64)
            for j in range(_ORDER):
                state = state * 4 + strand[j : j + len(state)]
            np.add.at(counts, (state, strand[_ORDER:]), 1)
    borders = np.cumsum(counts / counts.sum(axis=1, keepdims=True), axis=1)[:, :3]
    state = rng.integers(0, 4**_ORDER, chains)
    made = np.empty((chains, length), np.int8)
    for i in range(length):
        made[:, i] = (rng.random(chains)[:, None] > borders[state]).sum(axis=1)
        state = state * 4 % 4**_ORDER + made[:, i]
    return made.ravel()
