"""Squiggles simulated from a table of pore levels: what the network sees most of.

A simulated chunk is a sequence, a dwell for each base, the level of each 9-mer, and the noise of pore and amplifier.
Its difficulty goes from 0 (every base takes 10 samples, hardly any noise) to 1 (as real reads are): a network that
starts at 1 does not get beyond 65 % identity, one that is led there does.

The shares, dwells and noise at difficulty 1 are those measured on the training reads of sq_f5c, by their moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Bases of the context that sets a level; of them those that the auxiliary loss asks for: the first, and how many.
KMER, FIRST_AUX, AUX = 9, 2, 7
#: The base of the 9-mer whose arrival starts an event, for the CTC labels.
EMITTED = 6
#: Samples per chunk, of CTC frames per chunk, and samples per frame.
SAMPLES, STRIDE = 2004, 3
FRAMES = SAMPLES // STRIDE
_FRAME_MIDDLES = np.arange(FRAMES) * STRIDE + STRIDE // 2
#: Impulse response of the amplifier's filter at 4 kHz, fitted to the steps between samples of real reads.
_RESPONSE = np.array([0.02, 0.12, 0.72, 0.12, 0.02], np.float32)
#: Dwells, in units of a read's mean: most bases, and the share that stays long.
_DWELL_SIGMA, _LONG_SHARE, _LONG_MEDIAN, _LONG_SIGMA = 0.45, 0.06, 2.2, 0.8
#: Noise within a level, in units of the levels' standard deviation over all 9-mers, and its moving average: 0.3 gives
#: the measured autocorrelation of 0.27 at lag 1.
_NOISE, _NOISE_AVERAGE = 0.1, 0.3


@dataclass(frozen=True, slots=True)
class Chunks:
    """A batch for the network.

    `signal` is float32 of shape (chunks, SAMPLES), scaled as tasks/engines/cpu.py scales it; `labels` one int32 array
    per chunk, 1 to 4 for ACGT; `context` int64 of shape (chunks, FRAMES, AUX), 0 to 3, -100 where unknown.
    """

    signal: npt.NDArray[np.float32]
    labels: list[npt.NDArray[np.int32]]
    context: npt.NDArray[np.int64]


class Simulator:
    """Draws chunks of any difficulty from a level table and some real sequence."""

    def __init__(
        self,
        table: Path,
        sequences: list[npt.NDArray[np.int8]],
        *,
        real_sequence: float,
        table_error: float,
        noise_spread: float,
    ) -> None:
        """Set what chunks are made of.

        Args:
            table: Levels: uncalled4's .npz, current.mean and .stdv in AAAAAAAAA order, standardised.
            sequences: Real sequence, bases 0 to 3.
            real_sequence: Share of chunks with it: little of it is free, and a network learns it by heart.
            table_error: How far a chunk's levels lie from the table's, per place and base of the 9-mer: pores differ.
            noise_spread: Of the noise's strength from chunk to chunk, as the sigma of a log-normal.
        """
        self._real_sequence = real_sequence
        self._table_error = table_error
        self._noise_spread = noise_spread
        with np.load(table) as levels:
            self._level = levels["current.mean"].astype(np.float32)
            self._spread = np.minimum(levels["current.stdv"], 0.4).astype(np.float32)
        low, high = np.quantile(self._level, (0.2, 0.9))
        self._shift, self._scale = 0.51 * (low + high), 0.53 * (high - low)
        # The table's zero is the mean level in pA, the engine's formula starts at 0 pA.
        self._shift = self._shift - (1 - 2 * 0.51) * 92.56 / 23.11
        self._sequences = sequences
        self._weights = np.array([len(s) for s in sequences], float)
        self._weights /= self._weights.sum()

    def draw(self, chunks: int, difficulty: float, rng: np.random.Generator) -> Chunks:
        """Draw `chunks` chunks of about `difficulty` (0 to 1)."""
        signal = np.empty((chunks, SAMPLES), np.float32)
        context = np.empty((chunks, FRAMES, AUX), np.int64)
        labels = []
        for i in range(chunks):
            signal[i], label, context[i] = self._chunk(float(np.clip(difficulty * rng.uniform(0.7, 1.15), 0, 1)), rng)
            labels.append(label)
        return Chunks(signal, labels, context)

    def _chunk(
        self, hard: float, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        mean_dwell = 10 + hard * rng.uniform(-1.8, 3.5)
        events = int(SAMPLES / (0.5 * mean_dwell)) + 40
        bases = self._sequence(events + KMER, rng).astype(np.int64)
        kmers: npt.NDArray[np.int64] = np.zeros(events, np.int64)
        for j in range(KMER):
            kmers = kmers * 4 + bases[j : j + events]
        ends: npt.NDArray[np.int64] = np.cumsum(self._dwells(events, mean_dwell, hard, rng)).round().astype(np.int64)
        count = min(int(np.searchsorted(ends, SAMPLES)) + 1, events)
        ends, kmers = ends[:count], kmers[:count]
        ends[-1] = max(ends[-1], SAMPLES)
        level = self._level[kmers] + hard * rng.standard_normal(count, np.float32) * self._spread[kmers] * 0.9
        error = rng.normal(0, hard * self._table_error, (KMER, 4))
        level += error[np.arange(KMER), bases[np.arange(count)[:, None] + np.arange(KMER)]].sum(axis=1)
        current = np.repeat(level, np.diff(ends, prepend=0))[:SAMPLES].astype(np.float32)
        current = np.convolve(np.pad(current, 2, "edge"), _RESPONSE, "valid")
        current += self._noise(hard, rng)
        scaled = (current - self._shift) / self._scale
        scaled = scaled * (1 + hard * rng.normal(0, 0.05)) + hard * rng.normal(0, 0.08)
        at_frames = np.minimum(np.searchsorted(ends, _FRAME_MIDDLES, "right"), count - 1)
        context = bases[at_frames[:, None] + FIRST_AUX + np.arange(AUX)]
        label = (bases[EMITTED + 1 : EMITTED + count] + 1).astype(np.int32)
        return np.clip(scaled, -4, 4), label, context

    @staticmethod
    def _dwells(events: int, mean: float, hard: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        sigma = 0.02 + hard * _DWELL_SIGMA * rng.uniform(0.85, 1.15)
        dwell = rng.lognormal(-sigma * sigma / 2, sigma, events)
        long = rng.random(events) < _LONG_SHARE * hard
        dwell[long] = rng.lognormal(np.log(_LONG_MEDIAN), _LONG_SIGMA, int(long.sum()))
        expected = 1 + _LONG_SHARE * hard * (_LONG_MEDIAN * np.exp(_LONG_SIGMA**2 / 2) - 1)
        return np.maximum(dwell * mean / expected, 1.0)

    def _noise(self, hard: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        white = rng.standard_normal(SAMPLES + 1, np.float32)

        b = np.float32(_NOISE_AVERAGE)
        coloured = (white[1:] + b * white[:-1]) / np.sqrt(1 + b * b)
        slow = np.interp(np.arange(SAMPLES), np.linspace(0, SAMPLES, 9), rng.normal(0, 0.05, 9))
        strength = (0.03 + (_NOISE - 0.03) * hard) * np.exp(hard * rng.normal(0, self._noise_spread))
        noise: npt.NDArray[np.float32] = (strength * coloured + hard * slow).astype(np.float32)
        return noise

    def _sequence(self, length: int, rng: np.random.Generator) -> npt.NDArray[np.int8]:
        """Return real sequence, or random sequence of some GC content with homopolymers and short repeats put in."""
        if rng.random() < self._real_sequence:
            while True:
                sequence = self._sequences[rng.choice(len(self._sequences), p=self._weights)]
                if len(sequence) > length:
                    start = int(rng.integers(0, len(sequence) - length))
                    return sequence[start : start + length]
        gc = rng.uniform(0.3, 0.7)
        made = rng.choice(4, length, p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2]).astype(np.int8)
        for _ in range(int(rng.integers(0, 8))):
            unit = int(rng.choice([1, 1, 1, 2, 3, 4]))
            start = int(rng.integers(0, length - 40))
            stop = start + unit * int(rng.integers(3, 10))
            made[start:stop] = np.resize(made[start : start + unit], stop - start)
        return made
