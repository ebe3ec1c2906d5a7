"""Squiggles of new sequences in the time and noise of real reads: what the network learns from.

A few reads are all there is, and a network soon knows them by heart. Their time and noise, though, hardly depend on
what was sequenced: cut into events (reads.py), a read is a level per 9-mer, how long each event lasts, how far it lies
off its level, and the noise within it. A chunk here takes these from one read in one state, the last two from events of
9-mers about as loud as the new ones, and puts levels of a new sequence (levels.py) under them. A few chunks are
stretches of a read as it is, but for some bases.

Difficulty goes from 0 (every base takes as long, no noise) to 1 (as the reads are), for dwells and noise apart. What a
level says of its nine bases is learnt where it is easy to see; a network that starts at 1 takes many times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.training.levels import WINDOW, Bools, Levels, good
from infra.training.reads import KMER, NEWEST, Floats, SegmentedRead, kmers_of

#: Of the 9-mer's bases those that the auxiliary loss asks for: the first, and how many.
FIRST_AUX, AUX = 2, 7
#: Samples per chunk unless told otherwise, and per CTC frame.
SAMPLES, STRIDE = 2004, 3
#: Levels of neighbours this far apart, in the table's units, leave no doubt where an event begins and ends.
PLAIN = 0.8
#: Of events in order of their loudness, how far from a new one's own rank the one may lie that it takes its noise from.
ALIKE = 0.05
#: Samples of an even base, and those beyond which an event is a stall, which says nothing of a read's speed.
EVEN, STALL = 10.0, 60
#: Impulse response of the amplifier's filter at 4 kHz, beside the averaging over a sample.
RESPONSE = np.array([0.06, 0.88, 0.06])
#: Noise and offsets are in part what alignment got wrong: with this share of them, differences between samples are
#: distributed as in reads, and new sequences are as hard as reads.
STRENGTH = 0.85
#: Share of chunks in the pore's other state.
OTHER_STATE = 0.2
#: Share of bases that change in a chunk that keeps its sequence, and noise added, at most: else it is learnt by heart.
MUTATIONS, HISS = 0.3, 0.08
#: Bases that a new base of a made-up genome depends on.
_ORDER = 5


@dataclass(frozen=True, slots=True)
class Chunks:
    """A batch for the network.

    `signal` is float32 of shape (chunks, samples), scaled as tasks/engines/cpu.py scales it; `labels` int8 of shape
    (chunks, longest), 1 to 4 for ACGT, of which the first `lengths` count; `context` int8 of shape
    (chunks, samples / STRIDE, AUX), 0 to 3.
    """

    signal: Floats
    labels: npt.NDArray[np.int8]
    lengths: npt.NDArray[np.int32]
    context: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Manner:
    """How one state of one read goes.

    Its events, from the quietest 9-mer (`loudness`, by the table) to the loudest: how far off their levels they lie
    (`offsets`, scaled units), and where the noise within them starts in `noise`. `speeds`: mean dwells of its windows.
    """

    read: SegmentedRead
    state: int
    events: int
    loudness: Floats
    offsets: Floats
    starts: npt.NDArray[np.int64]
    noise: Floats
    speeds: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sequences:
    """New sequences, one after the other, and of each 9-mer its level in either state, (2, 9-mers), and loudness."""

    bases: npt.NDArray[np.int8]
    levels: Floats
    loudness: Floats


class Simulator:
    """Draws chunks of any difficulty: new sequences in the manners of reads, and stretches of these."""

    def __init__(
        self,
        reads: Sequence[SegmentedRead],
        states: Sequence[Bools],
        sequences: Sequences,
        levels: Levels,
        *,
        kept: float,
        samples: int = SAMPLES,
    ) -> None:
        """Set what chunks are made of, `samples` each; `kept` is the share of them that keep their own sequence."""
        self._samples, self._kept, self._levels = samples, kept, levels
        self._sequences = sequences
        self._dwells = np.concatenate([plain_dwells(read) for read in reads])
        self._manners = [
            manner for pair in zip(reads, states, strict=True) for manner in manners_of(*pair, levels.loudness)
        ]
        self._shares = _shares([manner.state for manner in self._manners], [manner.events for manner in self._manners])
        self._kept_of = [pair for pair in zip(reads, states, strict=True) if len(pair[0].residuals) > 3 * samples]
        self._kept_lengths = np.array([len(read.residuals) for read, _ in self._kept_of], float)

    def draw(self, chunks: int, difficulty: tuple[float, float], rng: np.random.Generator) -> Chunks:
        """Draw `chunks` chunks, each of some difficulty of dwells and some of noise between the two given."""
        frames = self._samples // STRIDE
        signal = np.empty((chunks, self._samples), np.float32)
        context = np.empty((chunks, frames, AUX), np.int8)
        labels = np.zeros((chunks, frames), np.int8)
        lengths = np.empty(chunks, np.int32)
        middles = np.arange(frames)[:, None] * STRIDE + STRIDE // 2
        for i in range(chunks):
            uneven, noisy = rng.uniform(*difficulty, 2)
            draw = self._keep if rng.random() < self._kept else self._make
            signal[i], bases, event = draw(uneven, noisy, rng)
            context[i] = bases[event[middles] + FIRST_AUX + np.arange(AUX)]
            lengths[i] = event[-1]
            labels[i, : lengths[i]] = bases[NEWEST + 1 : NEWEST + 1 + lengths[i]] + 1
            hiss, scale, shift = noisy * rng.uniform(0, 0.05), 1 + noisy * rng.normal(0, 0.04), rng.normal(0, 0.05)
            signal[i] += hiss * rng.standard_normal(self._samples, np.float32)
            signal[i] = signal[i] * scale + noisy * shift
        return Chunks(np.clip(signal, -4, 4), labels[:, : lengths.max()], lengths, context)

    def _make(
        self, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Make signal of a new sequence; return it, the bases, and of each sample the event."""
        manner = self._manners[int(np.searchsorted(self._shares, rng.random()))]
        read, count = manner.read, self._samples // 3
        mean = _mean_dwell(float(_drawn(manner.speeds, 1, rng)[0]), uneven, rng)
        dwell = mean * _drawn(self._dwells, count, rng) ** uneven
        dwell *= np.exp(0.1 * uneven * rng.standard_normal(count, np.float32))
        borders = np.concatenate(([0.0], np.cumsum(dwell))) - dwell[0] * rng.random()
        count = min(int(np.searchsorted(borders, self._samples + 1)), count)  # what lies beyond is not needed
        borders, dwell = borders[: count + 1], dwell[:count]
        first = int(rng.integers(0, len(self._sequences.bases) - count - KMER))
        bases = self._sequences.bases[first : first + count + KMER - 1]
        alike = np.searchsorted(manner.loudness, self._sequences.loudness[first : first + count])
        alike = np.clip(alike / len(manner.loudness) + rng.uniform(-ALIKE, ALIKE, count), 0, 1)
        donor = (alike * (len(manner.loudness) - 1)).astype(np.int64)
        strength = STRENGTH * noisy * np.exp(noisy * rng.normal(0, 0.2))
        level = read.offset + read.gain * self._sequences.levels[manner.state, first : first + count]
        level = level + strength * manner.offsets[donor]
        # Each sample is the average current of its time, whatever changes within it.
        charge = np.concatenate(([0.0], np.cumsum(level * dwell)))
        signal = np.diff(np.interp(np.arange(-1, self._samples + 2), borders, charge))
        signal = np.convolve(signal, RESPONSE, "valid")
        places = np.arange(self._samples)
        event = np.searchsorted(borders, places, "right") - 1
        since = places - np.ceil(borders[event]).astype(np.int64)
        signal += strength * np.take(manner.noise, manner.starts[donor[event]] + since, mode="wrap")
        return signal, bases, event

    def _keep(
        self, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Take a stretch of a read with its own sequence, of which some bases change; return as `_make` does."""
        number = rng.choice(len(self._kept_of), p=self._kept_lengths / self._kept_lengths.sum())
        read, other = self._kept_of[int(number)]
        while True:
            first = int(rng.integers(0, len(read.level) - 20))
            old = read.starts[first : first + self._samples // 3 + 1]
            lasted = np.diff(old)
            mean = _mean_dwell(lasted.mean(), uneven, rng)
            dwell = mean * (lasted / lasted.mean()) ** uneven * rng.lognormal(0, 0.1 * uneven, len(lasted))
            borders = np.concatenate(([0.0], np.cumsum(dwell))) - dwell[0] * rng.random()
            if borders[-1] > self._samples:
                break
        own = read.bases[first : first + len(lasted) + KMER - 1]
        bases = mutated(own, rng)
        here = slice(first, first + len(lasted))
        change = self._levels.of(bases, other[here]) - self._levels.of(own, other[here])
        places = np.arange(self._samples)
        event = np.searchsorted(borders, places, "right") - 1
        source = np.interp(places, borders, old).astype(np.int64)
        level = read.offset + read.gain * (read.level[here] + change)
        noise = read.residuals[source] + rng.uniform(0, HISS) * rng.standard_normal(self._samples, np.float32)
        return level[event] + noisy * noise, bases, event


def _drawn(values: npt.NDArray[np.floating], count: int, rng: np.random.Generator) -> npt.NDArray[np.floating]:
    return values[rng.integers(0, len(values), count)]


def _mean_dwell(speed: float, uneven: float, rng: np.random.Generator) -> float:
    return float(EVEN * (speed / EVEN * np.exp(rng.normal(0, 0.1))) ** uneven)


def _shares(states: Sequence[int], events: Sequence[int]) -> npt.NDArray[np.float64]:
    """Share chunks among manners by events, and OTHER_STATE of them among those in the other state; return the sums."""
    share, other = np.array(events, float), np.array(states, bool)
    if other.any() and not other.all():
        share[other] *= OTHER_STATE / share[other].sum()
        share[~other] *= (1 - OTHER_STATE) / share[~other].sum()
    shares: npt.NDArray[np.float64] = np.cumsum(share / share.sum())
    return shares


def local_means(dwells: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return, per event, the mean dwell of its window, in which stalls count no more than STALL."""
    windows = np.arange(len(dwells)) // WINDOW
    windows = np.minimum(windows, max(windows[-1] - 1, 0))  # the last one is whole
    means: npt.NDArray[np.float64] = np.bincount(windows, np.minimum(dwells, STALL)) / np.bincount(windows)
    return means[windows]


def plain_dwells(read: SegmentedRead) -> npt.NDArray[np.float64]:
    """Return how long peaks and valleys of a read last, in units of the mean dwell about them.

    Of other events alignment can't tell to the sample where they end, and leaves many as short as it may.
    """
    before, after = read.level[1:-1] - read.level[:-2], read.level[1:-1] - read.level[2:]
    plain = (np.minimum(before, after) > PLAIN) | (np.maximum(before, after) < -PLAIN)
    return (read.dwells / local_means(read.dwells))[1:-1][plain]


def manners_of(read: SegmentedRead, other: Bools, loudness: Floats) -> list[Manner]:
    """Return a read's manner in each of the states that it stays in for at least a window."""
    dwells, offsets = read.dwells, read.offsets
    usable = good(read)
    noise = read.residuals - np.repeat(offsets, dwells)
    loud = loudness[kmers_of(read.bases)]
    found = []
    for state in (0, 1):
        here = usable & (other == state)
        within = np.repeat(here, dwells)
        within[read.starts[:-1]] = within[read.starts[1:] - 1] = False  # borders lie amid these
        if (other == state).sum() >= WINDOW and here.any():
            order = np.flatnonzero(here)[np.argsort(loud[here], kind="stable")]
            starts = np.cumsum(within)[read.starts[order]]
            speeds = local_means(dwells)[other == state][:: WINDOW // 4]
            drawn = loud[order], offsets[order].astype(np.float32), starts, noise[within].astype(np.float32)
            found.append(Manner(read, state, int((other == state).sum()), *drawn, speeds))
    return found


def mutated(bases: npt.NDArray[np.int8], rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """Return bases of which up to MUTATIONS are drawn anew."""
    drawn = rng.random(len(bases)) < rng.uniform(0, MUTATIONS)
    return np.where(drawn, rng.integers(0, 4, len(bases)), bases).astype(np.int8)


def new_sequences(
    like: Sequence[npt.NDArray[np.int8]], levels: Levels, rng: np.random.Generator, pieces: int
) -> Sequences:
    """Return so many pieces of 4,000 bases: 0.6 of them like the given ones, the others random, with repeats put in."""
    own = int(0.6 * pieces)
    bases = np.concatenate((made_up_genome(like, rng, own), *(random_sequence(rng) for _ in range(pieces - own))))
    kmers = kmers_of(bases)
    shown = levels.tables[:, kmers] + levels.moved(bases, levels.tables[0, kmers])
    return Sequences(bases, shown, levels.loudness[kmers])


def random_sequence(rng: np.random.Generator, length: int = 4000) -> npt.NDArray[np.int8]:
    """Return random sequence whose GC content changes, with short repeats put in."""
    gc = np.repeat(rng.uniform(0.3, 0.7, length // 500 + 1), 500)[:length]
    drawn = rng.random(length)
    made = (drawn > (1 - gc) / 2).astype(np.int8) + (drawn > 0.5) + (drawn > (1 + gc) / 2)
    for _ in range(int(rng.integers(0, length // 50))):
        unit = int(rng.choice([1, 1, 1, 2, 3, 4]))
        start = int(rng.integers(0, length - 40))
        stop = start + unit * int(rng.integers(3, 10))
        made[start:stop] = np.resize(made[start : start + unit], stop - start)
    return made.astype(np.int8)


def made_up_genome(
    sequences: Sequence[npt.NDArray[np.int8]], rng: np.random.Generator, chains: int, length: int = 4000
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
