"""Squiggles of new sequences in the time and noise of real reads: what the network learns from.

A few reads are all there is, and a network soon knows them by heart. Their noise, though, does not depend on what was
sequenced: cut into events (reads.py), a real read is a level per 9-mer, a dwell per event, and a residual per sample. A
chunk here takes dwells and residuals of a stretch of a real read and puts other levels, of a new sequence, under them;
some chunks keep their own sequence but for some bases, which makes them nearly real signal.

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
#: Samples per chunk, of CTC frames per chunk, and samples per frame.
SAMPLES, STRIDE = 2004, 3
FRAMES = SAMPLES // STRIDE
_FRAME_MIDDLES = np.arange(FRAMES) * STRIDE + STRIDE // 2
#: Where call and signal disagree, alignment leaves events as short as it may, and residuals as large as levels. Neither
#: is noise. Of events of SHORTEST samples this share stays, as at peaks and valleys, where borders are plain; residuals
#: are cut at LARGEST, scaled units; and with STRENGTH a network finds new sequences as hard as reads it has not seen.
SHORTEST, SHORT_SHARE, LARGEST, STRENGTH = 2, 0.5, 0.4, 0.9
#: Share of bases that change in a chunk that keeps its sequence, at most: else that is learnt by heart.
MUTATIONS = 0.1
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

    def draw(self, chunks: int, difficulty: tuple[float, float], rng: np.random.Generator) -> Chunks:
        """Draw `chunks` chunks, each of some difficulty of dwells and some of noise between the two given."""
        signal = np.empty((chunks, SAMPLES), np.float32)
        context = np.empty((chunks, FRAMES, AUX), np.int64)
        labels = []
        for i in range(chunks):
            signal[i], label, context[i] = self._chunk(*rng.uniform(*difficulty, 2), rng)
            labels.append(label)
        return Chunks(signal, labels, context)

    def _chunk(
        self, uneven: float, noisy: float, rng: np.random.Generator
    ) -> tuple[Floats, npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        read = self._reads[rng.choice(len(self._reads), p=self._weights)]
        keep = rng.random() < self._kept
        events = len(read.starts) - 1
        first = int(rng.integers(0, events - 20))
        taken = np.arange(first, min(first + SAMPLES // 2, events))
        lasted = read.starts[taken + 1] - read.starts[taken]
        if not keep:
            plausible = (lasted > SHORTEST) | (rng.random(len(taken)) < SHORT_SHARE)
            taken, lasted = taken[plausible], lasted[plausible]
        mean = 10 * np.exp(uneven * rng.normal(0, 0.12))
        dwell = mean * (lasted / lasted.mean()) ** uneven * rng.lognormal(0, 0.1 * uneven, len(taken))
        borders = np.concatenate(([0.0], np.cumsum(dwell))) - dwell[0] * rng.random()
        if borders[-1] <= SAMPLES:
            return self._chunk(uneven, noisy, rng)
        count = int(np.searchsorted(borders, SAMPLES))
        length = count + KMER - 1
        bases = mutated(read.bases[first : first + length], rng) if keep else self._sequence(length, rng)
        # Of each sample of the chunk the event, and the sample of the read whose residual it takes.
        places = np.arange(SAMPLES)
        event = np.searchsorted(borders, places, "right") - 1
        into = ((places - borders[event]) / dwell[event] * lasted[event]).astype(np.int64)
        residual = noisy * read.residuals[read.starts[taken[event]] + np.minimum(into, lasted[event] - 1)]
        if not keep:
            residual = np.clip(residual, -LARGEST, LARGEST) * (STRENGTH * np.exp(noisy * rng.normal(0, 0.2)))
        signal = (read.offset + read.gain * self._table[kmers_of(bases)])[event] + residual
        signal += noisy * rng.uniform(0, 0.05) * rng.standard_normal(SAMPLES)
        signal = signal * (1 + noisy * rng.normal(0, 0.04)) + noisy * rng.normal(0, 0.05)
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
