"""Squiggles of new sequences in the time and noise of real reads: what the network learns from.

A few reads are all there is, and a network soon knows them by heart. Their noise, though, does not depend on what was
sequenced: cut into events (reads.py), a real read is a level per 9-mer, a dwell per event, and a residual per sample. A
chunk here takes dwells and residuals of a stretch of a real read and puts other levels, of a new sequence, under them;
some chunks keep their own sequence, which makes them real signal.

Difficulty goes from 0 (every base takes as long, no noise) to 1 (as the reads are): a network that starts at 1 takes
many times as long to learn anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infra.training.reads import KMER, NEWEST, Floats, SegmentedRead, kmers_of

#: Of the 9-mer's bases those that the auxiliary loss asks for: the first, and how many.
FIRST_AUX, AUX = 2, 7
#: Samples per chunk, of CTC frames per chunk, and samples per frame.
SAMPLES, STRIDE = 2004, 3
FRAMES = SAMPLES // STRIDE
_FRAME_MIDDLES = np.arange(FRAMES) * STRIDE + STRIDE // 2
#: Bases that a new base of a made-up genome depends on.
_ORDER = 5


@dataclass(frozen=True, slots=True)
class Chunks:
    """A batch for the network.

    `signal` is float32 of shape (chunks, SAMPLES), scaled as tasks/engines/cpu.py scales it; `labels` one int32 array
    per chunk, 1 to 4 for ACGT; `context` int64 of shape (chunks, FRAMES, AUX), 0 to 3.
    """

    signal: Floats
    labels: list[npt.NDArray[np.int32]]
    context: npt.NDArray[np.int64]


class Simulator:
    """Draws chunks of any difficulty from segmented reads and a level table."""

    def __init__(self, reads: Sequence[SegmentedRead], table: Floats, *, kept: float, seed: int) -> None:
        """Set what chunks are made of; `kept` is the share of them that keep their own sequence."""
        self._reads = [read for read in reads if len(read.residuals) > 3 * SAMPLES]
        self._weights = np.array([len(read.residuals) for read in self._reads], float)
        self._weights /= self._weights.sum()
        self._table = table
        self._kept = kept
        self._genome = made_up_genome([read.bases for read in reads], np.random.default_rng(seed))

    def draw(self, chunks: int, difficulty: float, rng: np.random.Generator) -> Chunks:
        """Draw `chunks` chunks of about `difficulty` (0 to 1)."""
        signal = np.empty((chunks, SAMPLES), np.float32)
        context = np.empty((chunks, FRAMES, AUX), np.int64)
        labels = []
        for i in range(chunks):
            hard = float(np.clip(difficulty * rng.uniform(0.7, 1.15), 0, 1))
            signal[i], label, context[i] = self._chunk(hard, rng)
            labels.append(label)
        return Chunks(signal, labels, context)

    def _chunk(
        self, hard: float, rng: np.random.Generator
    ) -> tuple[Floats, npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        read = self._reads[rng.choice(len(self._reads), p=self._weights)]
        events = len(read.starts) - 1
        first = int(rng.integers(0, events - 20))
        old = read.starts[first : min(first + SAMPLES // 2, events) + 1]
        dwell = np.diff(old)
        mean = 10 * np.exp(hard * rng.normal(0, 0.12))
        dwell = mean * np.maximum((dwell / dwell.mean()) ** hard * rng.lognormal(0, 0.1 * hard, len(dwell)), 0.1)
        new = np.concatenate(([0.0], np.cumsum(dwell))) - dwell[0] * rng.random()
        if new[-1] <= SAMPLES:
            return self._chunk(hard, rng)
        count = int(np.searchsorted(new, SAMPLES))
        keep = rng.random() < self._kept
        bases = read.bases[first : first + count + KMER - 1] if keep else self._sequence(count + KMER - 1, rng)
        level = read.offset + read.gain * self._table[kmers_of(bases)]
        strength = hard * (1.0 if keep else np.exp(rng.normal(0, 0.2)))
        # Of each sample of the chunk the event, and the sample of the read whose residual it takes.
        places = np.arange(SAMPLES)
        event = np.searchsorted(new, places, "right") - 1
        source = np.interp(places, new, old).astype(np.int64)
        signal = level[event] + strength * read.residuals[source]
        signal += hard * rng.uniform(0, 0.05) * rng.standard_normal(SAMPLES)
        signal = signal * (1 + hard * rng.normal(0, 0.04)) + hard * rng.normal(0, 0.05)
        at_frames = event[_FRAME_MIDDLES]
        context = bases[at_frames[:, None] + FIRST_AUX + np.arange(AUX)].astype(np.int64)
        label = (bases[NEWEST + 1 : NEWEST + count] + 1).astype(np.int32)
        return np.clip(signal, -4, 4).astype(np.float32), label, context

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


def made_up_genome(
    sequences: Sequence[npt.NDArray[np.int8]], rng: np.random.Generator, chains: int = 1000, length: int = 4000
) -> npt.NDArray[np.int8]:
    """Return chains * length bases that follow each other as in the sequences and their reverse complements.

    A Markov chain of order 5: what two strands of a genome have in common, and nothing to be learnt by heart.
    """
    counts = np.ones((4**_ORDER, 4))
    for one in sequences:
        for strand in (one, 3 - one[::-1]):
            state = np.zeros(len(strand) - _ORDER, np.int64)
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
