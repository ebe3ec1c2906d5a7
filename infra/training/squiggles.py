"""Squiggles of new sequences in the time and noise of real reads: what the network learns from.

A few reads are all there is, and a network soon knows them by heart, their noise above all. Their time and noise,
though, hardly depend on what was sequenced: cut into events (reads.py), a read is a level per 9-mer, how long each
event lasts, and by how much its samples differ from the level. A chunk here has levels of a new sequence (levels.py),
the speed of one read in one state, and the differences of events of this read that are about as loud, last about as
long, and lie between like steps: these tell most of what goes on where levels change. Or it has a stretch of the
read's own sequence, but for some bases, and lies off its levels as the read does, which depends on what lies about in
ways that levels.py doesn't know, with time and noise drawn like those of new sequences, or with its own.

Difficulty goes from 0 (every base takes as long, no noise) to 1 (as the reads are), for dwells and noise apart. What a
level says of its nine bases is learnt where it is easy to see; a network that starts at 1 takes many times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.training.levels import FAR, WINDOW, Bools, Levels, good
from infra.training.reads import KMER, NEWEST, Floats, SegmentedRead, kmers_of

#: Of the 9-mer's bases those that the auxiliary loss asks for: the first, and how many.
FIRST_AUX, AUX = 2, 7
#: Samples per chunk unless told otherwise, and per CTC frame.
SAMPLES, STRIDE = 2004, 3
#: Levels of neighbours this far apart, in the table's units, leave no doubt where an event begins and ends.
PLAIN = 0.8
#: How far events may lie apart in what noise depends on: ranks by loudness, octaves of dwell, steps in level (table
#: units), and what an event is off by (scaled units).
RANK, OCTAVE, STEP, AWAY = 0.1, 0.25, 0.3, 0.05
#: Samples of an even base, and those beyond which an event is a stall, which says nothing of a read's speed.
EVEN, STALL = 10.0, 60
#: Noise and offsets are in part what alignment got wrong: with all of them, new sequences are harder than reads.
STRENGTH = 0.9
#: Share of chunks in the pore's other state.
OTHER_STATE = 0.2
#: Share of bases that change, at most, in a chunk with a read's own sequence: else it is learnt by heart.
MUTATIONS = 0.3
#: Of these chunks, the share that also keeps the read's own time and noise.
ITSELF = 0.5
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

    `events` are those to take noise from, and `forms`, (5, events), what it depends on (`form_of`). `off`: how far off
    all events lie, NaN where that isn't known. `speeds`: mean dwells of windows.
    """

    read: SegmentedRead
    other: Bools
    off: Floats
    state: int
    events: npt.NDArray[np.int64]
    forms: Floats
    speeds: npt.NDArray[np.float64]

    def alike(self, form: Floats, but: slice, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Find, for new events of this form, the most alike among half of the read's, none in `but`."""
        outside = (self.events < but.start) | (self.events >= but.stop)
        among = np.flatnonzero((rng.random(len(self.events)) < 0.5) & outside)
        forms = self.forms[:, among]
        unknown = np.isnan(form[-1])
        known = np.where(np.isnan(form), 0, form)
        # Squared distances, less what is the same for all events of the read.
        apart = (forms[:-1] ** 2).sum(axis=0) + np.outer(~unknown, forms[-1] ** 2) - 2 * known.T @ forms
        return self.events[among[apart.argmin(axis=1)]]


def form_of(
    ranks: npt.NDArray[np.floating], level: Floats, dwells: npt.NDArray[np.int64], off: npt.NDArray[np.floating]
) -> Floats:
    """Return what the noise of events depends on, (5, events), in units of what makes as much of a difference.

    That is how loud their 9-mers are, how long they last, the steps before and after them, how far off they lie.
    """
    step = np.diff(level) / STEP
    form = ranks / RANK, np.log2(dwells) / OCTAVE, np.insert(step, 0, 0), np.append(step, 0), off / AWAY
    return np.stack(form).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Sequences:
    """New sequences, one after the other, and of each 9-mer its level in either state, (2, 9-mers)."""

    bases: npt.NDArray[np.int8]
    levels: Floats


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
        self._ranks = levels.loudness.argsort(kind="stable").argsort() / len(levels.loudness)
        self._manners = [
            manner for pair in zip(reads, states, strict=True) for manner in manners_of(*pair, self._ranks)
        ]
        self._shares = _shares(self._manners)

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
            signal[i], bases, event = self._one(uneven, noisy, rng)
            context[i] = bases[event[middles] + FIRST_AUX + np.arange(AUX)]
            lengths[i] = event[-1]
            labels[i, : lengths[i]] = bases[NEWEST + 1 : NEWEST + 1 + lengths[i]] + 1
            hiss, scale, shift = noisy * rng.uniform(0, 0.04), 1 + noisy * rng.normal(0, 0.04), rng.normal(0, 0.05)
            signal[i] += hiss * rng.standard_normal(self._samples, np.float32)
            signal[i] = signal[i] * scale + noisy * shift
        return Chunks(np.clip(signal, -4, 4), labels[:, : lengths.max()], lengths, context)

    def _one(
        self, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int8], npt.NDArray[np.int64]]:
        """Draw a chunk's signal; return it, the bases, and of each sample the event."""
        strength = noisy * np.exp(noisy * rng.normal(0, 0.2))
        manner = self._manners[int(np.searchsorted(self._shares, rng.random()))]
        kind = rng.random()
        first = self._first(manner, rng) if kind < self._kept else None
        itself = first is not None and kind < ITSELF * self._kept
        starts = self._starts(manner, manner.read.dwells[first:] if itself else None, uneven, rng)
        dwells = np.diff(starts)
        off: Floats = np.full(len(dwells), np.nan, np.float32)
        here = slice(0, 0)
        if first is None:
            bases, level = self._new(manner, len(dwells), rng)
        else:
            here = slice(first, first + len(dwells))
            bases, level = self._own(manner, here, rng)
            off = manner.off[here]
        if itself:
            noise = residuals(manner.read, np.arange(here.start, here.stop), dwells)
        else:
            form = form_of(self._ranks[kmers_of(bases)], level, dwells, off)
            noise = STRENGTH * residuals(manner.read, manner.alike(form, here, rng), dwells, off)
        event = np.repeat(np.arange(len(dwells)), dwells)
        signal = manner.read.offset + manner.read.gain * level[event] + strength * noise
        shown = slice(-starts[0], self._samples - starts[0])
        return signal[shown], bases, event[shown]

    def _first(self, manner: Manner, rng: np.random.Generator) -> int | None:
        """Draw an event of the read in that state, with enough of them after it; return None when there is none."""
        firsts = np.flatnonzero(manner.other[: max(len(manner.other) - self._samples // 3, 0)] == manner.state)
        return int(rng.choice(firsts)) if len(firsts) else None

    def _starts(
        self, manner: Manner, lasted: npt.NDArray[np.int64] | None, uneven: float, rng: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """Draw where events begin, the first before the chunk, and where the last one ends, beyond it.

        They last about as long as `lasted` tells, if it does.
        """
        count = self._samples // 3
        if lasted is None:
            speed, relative = float(_drawn(manner.speeds, 1, rng)[0]), _drawn(self._dwells, count, rng)
        else:
            speed = float(lasted[:count].mean())
            relative = lasted[:count] / speed
        dwell = EVEN * (speed / EVEN * np.exp(rng.normal(0, 0.1)) * relative) ** uneven
        dwell *= np.exp(0.1 * uneven * rng.standard_normal(count, np.float32))
        dwells = np.maximum(np.rint(dwell), 2).astype(np.int64)
        starts = np.insert(np.cumsum(dwells), 0, 0) - rng.integers(0, dwells[0])
        return starts[: int(np.searchsorted(starts, self._samples)) + 1]

    def _new(self, manner: Manner, count: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int8], Floats]:
        """Take so many events of a new sequence: bases, and levels of their 9-mers."""
        first = int(rng.integers(0, len(self._sequences.bases) - count - KMER))
        bases = self._sequences.bases[first : first + count + KMER - 1]
        return bases, self._sequences.levels[manner.state, first : first + count]

    def _own(self, manner: Manner, here: slice, rng: np.random.Generator) -> tuple[npt.NDArray[np.int8], Floats]:
        """Take events of the read's own sequence, some of whose bases change."""
        bases = mutated(manner.read.bases[here.start : here.stop + KMER - 1], rng)
        return bases, self._levels.of(bases, manner.other[here])


def residuals(
    read: SegmentedRead,
    events: npt.NDArray[np.int64],
    dwells: npt.NDArray[np.int64],
    off: npt.NDArray[np.floating] | None = None,
) -> npt.NDArray[np.float64]:
    """Return what the samples of these events of a read are off by, in the order given, each for another dwell.

    What an event is off by as a whole gives way to what `off` tells, where it tells anything. One begins as it does in
    the read and ends as it does there; amid one that was shorter there, something comes twice.
    """
    event = np.repeat(np.arange(len(events)), dwells)
    since = np.arange(len(event)) - np.repeat(np.cumsum(dwells) - dwells, dwells)
    left = dwells[event] - 1 - since
    lasted = read.dwells[events][event]
    place = np.where(since <= left, since % lasted, lasted - 1 - left % lasted)
    found: npt.NDArray[np.float64] = read.residuals[read.starts[events][event] + place].astype(float)
    return found if off is None else found + np.where(np.isnan(off), 0, off - read.offsets[events])[event]


def _drawn(values: npt.NDArray[np.floating], count: int, rng: np.random.Generator) -> npt.NDArray[np.floating]:
    return values[rng.integers(0, len(values), count)]


def _shares(manners: Sequence[Manner]) -> npt.NDArray[np.float64]:
    """Share chunks among manners by events, and OTHER_STATE of them among those in the other state; return the sums."""
    share = np.array([(manner.other == manner.state).sum() for manner in manners], float)
    other = np.array([manner.state for manner in manners], bool)
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


def manners_of(read: SegmentedRead, other: Bools, ranks: npt.NDArray[np.float64]) -> list[Manner]:
    """Return a read's manner in each of the states that it stays in for at least a window."""
    near = np.abs(read.offsets) < FAR
    off = np.where(good(read), read.offsets, np.nan).astype(np.float32)
    forms = form_of(ranks[kmers_of(read.bases)], read.level, read.dwells, read.offsets)
    found = []
    for state in (0, 1):
        here = other == state
        events = np.flatnonzero(near & here)
        if here.sum() >= WINDOW and len(events):
            speeds = local_means(read.dwells)[here][:: WINDOW // 4]
            found.append(Manner(read, other, off, state, events, forms[:, events], speeds))
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
    return Sequences(bases, shown)


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
