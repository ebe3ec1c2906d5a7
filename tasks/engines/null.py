"""The rehearsal engine: answers at once, or at a set rate, with bases that it makes up.

The bases are a fixed function of read id and length, so that two pipelines can be compared byte for byte and only the
pipeline's own cost is measured. Everything it has called says `null` in its file names.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from zlib import crc32

import numpy as np
import numpy.typing as npt

from tasks.core.calls import ERROR_PROBABILITY, BasecalledRead, EngineIdentity, Outcome, mean_qscore
from tasks.core.reads import Read

NULL_IDENTITY = EngineIdentity(engine="null", version="1", model="null", model_digest="", stride=5)
NULL_MIN_QSCORE = 9.0
#: Samples per made-up base: 400 bases/s at 5 kHz.
SAMPLES_PER_BASE = 12.5
_RING = 1 << 20


class NullEngine:
    """Makes bases up.

    With a rate, samples/s, it behaves as a server that does one thing after another: all slots of a worker share its
    clock, reads wait in it up to `in_flight_samples` per slot, and `busy` tells how much of its time it had something
    to do.
    """

    identity = NULL_IDENTITY

    def __init__(self, rate: float | None = None, *, in_flight_samples: int = 40_000_000) -> None:
        self._bases, self._qualities, self._errors = _ring()
        self._rate = rate
        self._in_flight_samples = in_flight_samples
        self._lock = threading.Lock()
        self._free_at: float | None = None
        self._began = 0.0
        self._given = 0.0
        self._never = threading.Event()

    @property
    def busy(self) -> tuple[float, float]:
        """Seconds with something to do, and seconds since the first read came in, until now or the last one went out.

        Exact at any time, while reads are in flight too. Zeros without a rate, and before the first read.
        """
        with self._lock:
            if self._free_at is None:
                return 0.0, 0.0
            ahead = max(0.0, self._free_at - time.monotonic())
            return self._given - ahead, self._free_at - ahead - self._began

    @property
    def busy_seconds(self) -> float:
        """Seconds with something to do, so far."""
        return self.busy[0]

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read with its made-up call, in order; with a rate, when the rate has got to it."""
        if self._rate is None:
            for read in reads:
                yield read, self._answer(read)
            return
        waiting: deque[tuple[float, Read]] = deque()
        held = 0
        for read in reads:
            waiting.append((self._submit(read.num_samples), read))
            held += read.num_samples
            while waiting and (held > self._in_flight_samples or waiting[0][0] <= time.monotonic()):
                first = self._await(waiting)
                held -= first.num_samples
                yield first, self._answer(first)
        while waiting:
            first = self._await(waiting)
            yield first, self._answer(first)

    def close(self) -> None:
        """Hold nothing, free nothing."""

    def _submit(self, samples: int) -> float:
        """Queue samples at the shared clock; return when they will be done, monotonic seconds."""
        assert self._rate is not None
        with self._lock:
            now = time.monotonic()
            if self._free_at is None:
                self._free_at = self._began = now
            self._given += samples / self._rate
            self._free_at = max(now, self._free_at) + samples / self._rate
            return self._free_at

    def _await(self, waiting: deque[tuple[float, Read]]) -> Read:
        due, read = waiting.popleft()
        if (left := due - time.monotonic()) > 0:
            self._never.wait(left)
        return read

    def _answer(self, read: Read) -> Outcome:
        length = int(read.num_samples / SAMPLES_PER_BASE)
        if not length:
            return Outcome.skipped("too_short")
        start = crc32(read.read_id.encode()) % _RING
        sequence, quality = self._bases[start : start + length], self._qualities[start : start + length]
        if len(sequence) == length:
            error = float(self._errors[start + length] - self._errors[start]) / length
            qscore = -10.0 * math.log10(error)
        else:  # longer than the ring
            repeats = -(-length // len(sequence))
            sequence, quality = (sequence * repeats)[:length], (quality * repeats)[:length]
            qscore = mean_qscore(quality)
        return Outcome.called(
            BasecalledRead(
                read_id=read.read_id,
                parent_read_id=read.read_id,
                sequence=sequence,
                qstring=quality,
                mean_qscore=qscore,
                stride=NULL_IDENTITY.stride,
                num_samples=read.num_samples,
            )
        )


@cache
def _ring() -> tuple[bytes, bytes, npt.NDArray[np.float64]]:
    """Make bases, qualities and the running sum of their error probabilities, once per process."""
    random = np.random.default_rng(4)
    bases = np.frombuffer(b"ACGT", np.uint8)[random.integers(0, 4, 2 * _RING)].tobytes()
    # Qualities wander between about 4 and 40, as real ones do; slices differ in their mean, so that some fail.
    sums = np.concatenate(([0.0], np.cumsum(random.normal(0, 1, 2 * _RING + 4095))))
    wander = (sums[4096:] - sums[:-4096]) / 64
    scores = np.clip(17 + 3 * wander + random.normal(0, 7, 2 * _RING), 2, 45).astype(np.uint8) + 33
    return bases, scores.tobytes(), np.concatenate(([0.0], np.cumsum(ERROR_PROBABILITY[scores])))
