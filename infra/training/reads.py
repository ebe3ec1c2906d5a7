"""Real reads for training: signal, published calls, and where in the signal each base arrived."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pod5

from infra.training.squiggles import AUX, EMITTED, FIRST_AUX, FRAMES, SAMPLES, STRIDE, Chunks

#: Reads of sq_f5c, by the start of their ids, that no training sees, and those that judge a training while it runs.
HELD_OUT = ("a2d0e216", "27a95eec", "98b72b64", "4a3e2e64", "021687eb", "6cdc3e0d")
VALIDATION = ("64a25d50", "666dea1e")
_CODE = np.full(256, -1, np.int8)
_CODE[list(b"ACGT")] = range(4)
_FRAME_MIDDLES = np.arange(FRAMES) * STRIDE + STRIDE // 2


@dataclass(frozen=True, slots=True)
class CalledRead:
    """A read with its call: scaled signal, bases 0 to 3, and the sample at which each base arrived."""

    read_id: str
    signal: npt.NDArray[np.float32]
    bases: npt.NDArray[np.int8]
    arrivals: npt.NDArray[np.int64]


def scaled(picoampere: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale a read's current as tasks/engines/cpu.py does."""
    in_pore = picoampere[(picoampere > 30) & (picoampere < 200)]
    low, high = np.quantile(in_pore, (0.2, 0.9))
    out: npt.NDArray[np.float32] = np.clip((picoampere - 0.51 * (low + high)) / (0.53 * (high - low)), -4, 4)
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
            if len(steps) == len(bases):
                arrivals = start + np.concatenate(([0], np.cumsum(steps)))[:-1]
                reads.append(CalledRead(name, scaled(record.signal_pa), bases, arrivals))
    return reads


class Sampler:
    """Draws chunks of real reads, played at another speed, with dwells changed base by base, and with some noise."""

    def __init__(self, reads: list[CalledRead]) -> None:
        self._reads = [r for r in reads if len(r.signal) > 3 * SAMPLES and (r.bases >= 0).all()]
        self._weights = np.array([len(r.signal) for r in self._reads], float)
        self._weights /= self._weights.sum()

    def draw(self, chunks: int, rng: np.random.Generator) -> Chunks:
        """Draw `chunks` chunks."""
        signal = np.empty((chunks, SAMPLES), np.float32)
        context = np.full((chunks, FRAMES, AUX), -100, np.int64)
        labels: list[npt.NDArray[np.int32]] = []
        while len(labels) < chunks:
            read = self._reads[rng.choice(len(self._reads), p=self._weights)]
            drawn = self._chunk(read, context[len(labels)], rng)
            if drawn:
                signal[len(labels)] = drawn[0]
                labels.append(drawn[1])
        return Chunks(signal, labels, context)

    @staticmethod
    def _chunk(
        read: CalledRead, context: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]] | None:
        speed = rng.uniform(0.82, 1.2)
        first = int(rng.integers(0, len(read.arrivals) - 60))
        # Each base's dwell is stretched on its own: where a sample of the chunk lies in the read.
        arrivals = read.arrivals[first : first + SAMPLES // 3]
        dwell = np.diff(arrivals) / speed * rng.lognormal(0, 0.15, len(arrivals) - 1)
        new = np.concatenate(([0.0], np.cumsum(dwell)))
        if new[-1] < SAMPLES + 1:
            return None
        places = np.interp(np.arange(SAMPLES), new, arrivals)
        lo, hi = int(places[0]), int(places[-1]) + 2
        if hi > len(read.signal):
            return None
        signal = np.interp(places, np.arange(lo, hi), read.signal[lo:hi])
        count = int(np.searchsorted(new, SAMPLES))
        if count < 60:
            return None
        signal = signal * (1 + rng.normal(0, 0.05)) + rng.normal(0, 0.06)
        signal = signal + rng.standard_normal(SAMPLES) * rng.uniform(0, 0.08)
        # Event i of the simulator shows bases i to i + 8 and emits base i + EMITTED.
        event = first + np.searchsorted(new, _FRAME_MIDDLES, "right") - 1 - EMITTED
        for j in range(AUX):
            at = event + FIRST_AUX + j
            inside = (at >= 0) & (at < len(read.bases))
            context[inside, j] = read.bases[at[inside]]
        return np.clip(signal, -4, 4).astype(np.float32), (read.bases[first + 1 : first + count] + 1).astype(np.int32)
