"""The embedded engine: bases on any CPU, by the bundled model or by a model directory of ONT's.

Signal is scaled as the model wants it, cut into overlapping chunks, and chunks of several reads go through the network
together, in a shape that only their own lengths decide, so that a read's bases do not depend on its neighbours.

A read is decoded chunk by chunk, so that one of 100 M samples needs memory for its bases and moves, not for its frames'
probabilities or its signal in floats.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from tasks.core.adapters import without_adapters
from tasks.core.calls import BasecalledRead, EngineIdentity, Outcome, mean_qscore
from tasks.core.reads import Read
from tasks.engines.catalogue import Model
from tasks.engines.networks import Calls, Network, open_network

logger = logging.getLogger(__name__)

#: Reads shorter than this are not called; ONT's server does the same.
MIN_SAMPLES = 100
#: pA of a strand in the pore; open pore and dead channel lie outside.
IN_PORE = (30.0, 200.0)
#: Scaled signal lies within.
CLIP = 4.0
#: Samples at the model's rate that are judged together: where their median is no strand's, no base comes.
BLOCK = 100
#: Samples that the scaling quantiles are taken of, at most.
SCALING_SAMPLES = 200_000
#: Reads and samples that may wait for a full set of chunks; beyond, chunks go through the network as they are.
WAITING_READS, WAITING_SAMPLES = 256, 4_000_000
_ALPHABET = np.frombuffer(b"NACGT", np.uint8)


def cpu_identity(model: Model) -> EngineIdentity:
    """Tell who calls with a model."""
    return EngineIdentity(
        engine="cpu", version=version("shoal"), model=model.name, model_digest=model.digest, stride=model.stride
    )


class CpuEngine:
    """Calls reads on this process's CPU. Holds a few chunks of signal beside the read it is given."""

    def __init__(
        self, model: Model, threads: int = 1, *, moves: bool = False, int8: bool = False, trim: bool = False
    ) -> None:
        self._network = open_network(model, threads=threads, int8=int8)
        self._model = model
        self._moves = moves
        self._trim = trim
        self.identity = cpu_identity(model)

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read with its answer, in order."""
        waiting: deque[_Calling] = deque()
        queues: dict[int, list[_Chunk]] = {}
        held = 0
        for read in reads:
            calling = _Calling(read, self._model, self._network, moves=self._moves, trim=self._trim)
            waiting.append(calling)
            held += read.num_samples
            for number, signal in enumerate(calling.chunks()):
                size = padded(len(signal), self._network.chunk)
                queue = queues.setdefault(size, [])
                queue.append(_Chunk(calling, number, signal))
                if len(queue) == self._network.together:
                    self._run(queue, size)
            if len(waiting) > WAITING_READS or held > WAITING_SAMPLES:
                self._run_all(queues)
            while waiting and waiting[0].finished:
                done = waiting.popleft()
                held -= done.read.num_samples
                yield done.read, done.outcome()
        self._run_all(queues)
        while waiting:
            done = waiting.popleft()
            yield done.read, done.outcome()

    def close(self) -> None:
        """Hold nothing that needs closing."""

    def _run_all(self, queues: dict[int, list[_Chunk]]) -> None:
        for size, queue in queues.items():
            if queue:
                self._run(queue, size)

    def _run(self, queue: list[_Chunk], size: int) -> None:
        """Put chunks through the network, in the one shape used for this size, and hand the frames back."""
        x = np.zeros((self._network.together, size), np.float32)
        for i, chunk in enumerate(queue):
            x[i, : len(chunk.signal)] = chunk.signal
        bases, sure = self._network.call(x)
        for i, chunk in enumerate(queue):
            frames = len(chunk.signal) // self._model.stride
            alive = chunk.calling.in_pore(chunk.signal)[np.arange(frames) * self._model.stride // BLOCK]
            chunk.calling.take(chunk.number, (bases[i, :frames] * alive, sure[i, :frames]))
        queue.clear()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A stretch of a read's scaled signal; `number` from 0."""

    calling: _Calling
    number: int
    signal: npt.NDArray[np.float32]


class _Calling:
    """One read on its way through the network."""

    def __init__(self, read: Read, model: Model, network: Network, *, moves: bool, trim: bool) -> None:
        self.read = read
        self._model = model
        self._network = network
        self._with_moves = moves
        self._trim = trim
        self._stride = model.stride
        self._ratio = 1.0
        #: Samples at the model's rate, whole frames of the trunk.
        self._length = 0
        #: What the chunks so far decode to: the bases, their frames, how sure the network is of them.
        self._bases: list[npt.NDArray[np.uint8]] = []
        self._places: list[npt.NDArray[np.int64]] = []
        self._sure: list[npt.NDArray[np.float32]] = []
        self._frames = 0
        #: The last frames of the last chunk, which the next one has too.
        self._waiting: Calls = np.zeros(0, np.uint8), np.zeros(0, np.float32)
        #: Chunks that came back before one that comes before them; how many have been put in their place.
        self._out_of_turn: dict[int, Calls] = {}
        self._placed = 0
        self._left = 0
        self._whole = True
        self._early: Outcome | None = None
        self._middle = self._spread = 0.0

    @property
    def finished(self) -> bool:
        """Whether all chunks have come back."""
        return self._whole and not self._left

    def chunks(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the read's scaled signal in chunks; none when there is nothing to call."""
        try:
            self._early = self._scale()
            if self._early:
                return
            size, overlap = self._network.chunk, self._network.overlap
            for start in range(0, max(self._length - overlap, 1), size - overlap):
                stop = min(start + size, self._length)
                self._whole = False
                chunk = self._signal(start, stop)
                self._left += 1
                self._whole = stop == self._length
                yield chunk
        except Exception as error:  # of one read; the others go on
            logger.exception("read %s can't be scaled", self.read.read_id)
            self._early, self._whole = _failed(error), True

    def take(self, number: int, frames: Calls) -> None:
        """Take a chunk's frames, and put in their place what can be."""
        self._left -= 1
        self._out_of_turn[number] = frames
        while (calls := self._out_of_turn.pop(self._placed, None)) is not None:
            self._placed += 1
            self._place(*calls, last=self.finished and not self._out_of_turn)

    def _place(self, bases: npt.NDArray[np.uint8], sure: npt.NDArray[np.float32], *, last: bool) -> None:
        """Join a chunk's frames to those before; its last ones wait for the next chunk, which overlaps them."""
        before, before_sure = self._waiting
        cut = seam(before, bases)
        self._keep(before[:cut], before_sure[:cut])
        stop = len(bases) if last else len(bases) - self._network.overlap // self._stride
        self._keep(bases[cut:stop], sure[cut:stop])
        self._waiting = bases[stop:], sure[stop:]

    def _keep(self, bases: npt.NDArray[np.uint8], sure: npt.NDArray[np.float32]) -> None:
        places = np.flatnonzero(bases)
        self._bases.append(bases[places])
        self._places.append(places + self._frames)
        self._sure.append(sure[places])
        self._frames += len(bases)

    def in_pore(self, chunk: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return of each block of a chunk whether a strand was in the pore: reads have dead tails, and open pore."""
        whole = len(chunk) // BLOCK * BLOCK
        levels: npt.NDArray[np.float32] = np.median(chunk[:whole].reshape(-1, BLOCK), axis=1)
        if whole < len(chunk):
            levels = np.append(levels, np.median(chunk[-BLOCK:]))
        low, high = ((limit - self._middle) / self._spread for limit in IN_PORE)
        inside: npt.NDArray[np.bool_] = (levels > max(low, -CLIP)) & (levels < min(high, CLIP))
        return inside

    def outcome(self) -> Outcome:
        """Decode what came back."""
        if self._early:
            return self._early
        try:
            return self._decode()
        except Exception as error:  # of one read; the others go on
            logger.exception("read %s can't be decoded", self.read.read_id)
            return _failed(error)

    def _scale(self) -> Outcome | None:
        """Find the scaling; return the outcome when there is nothing to call."""
        read = self.read
        unit = self._network.unit
        self._ratio = read.run.sample_rate / (self._model.sample_rate or read.run.sample_rate)
        self._length = int(read.num_samples / self._ratio) // unit * unit
        if read.num_samples < MIN_SAMPLES or not self._length:
            return Outcome.skipped("too_short")
        step = -(-read.num_samples // SCALING_SAMPLES)
        sampled = (read.signal[::step] + np.float32(read.calibration_offset)) * np.float32(read.calibration_scale)
        in_pore = sampled[(sampled > IN_PORE[0]) & (sampled < IN_PORE[1])]
        if len(in_pore) * step < MIN_SAMPLES:
            return Outcome.skipped("dead_signal")
        self._middle, self._spread = middle_and_spread(in_pore, *self._model.scaling)
        return None if self._spread > 0 else Outcome.skipped("dead_signal")

    def _signal(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return samples `start` to `stop` at the model's rate, scaled and clipped."""
        read = self.read
        if self._ratio == 1.0:
            raw = read.signal[start:stop].astype(np.float32)
        else:
            places = np.arange(start, stop) * self._ratio
            first = int(places[0])
            here = read.signal[first : int(places[-1]) + 2]
            raw = np.interp(places - first, np.arange(len(here)), here).astype(np.float32)
        scale = np.float32(read.calibration_scale / self._spread)
        shift = np.float32((read.calibration_offset * read.calibration_scale - self._middle) / self._spread)
        scaled: npt.NDArray[np.float32] = np.clip(raw * scale + shift, -CLIP, CLIP)
        return scaled

    def _decode(self) -> Outcome:
        bases = np.concatenate(self._bases)
        if not len(bases):
            return Outcome.skipped("no_bases")
        error = np.maximum(1.0 - np.concatenate(self._sure), np.float32(1e-4))
        slope, offset = self._model.qscore
        scores = np.clip(np.round(slope * -10.0 * np.log10(error) + offset), 1, 50).astype(np.uint8)
        qstring = (scores + 33).tobytes()
        # In strides of the read's own samples, whatever the model's rate.
        starts = (np.concatenate(self._places) * self._ratio).astype(np.int64)
        call = BasecalledRead(
            read_id=self.read.read_id,
            parent_read_id=self.read.read_id,
            sequence=_ALPHABET[bases].tobytes(),
            qstring=qstring,
            mean_qscore=mean_qscore(qstring),
            stride=self._stride,
            num_samples=self.read.num_samples,
            moves=self._moves(starts) if self._with_moves else None,
            scaling_midpoint=self._middle,
            scaling_dispersion=self._spread,
            scaling_version=self._model.scaling[0],
        )
        return Outcome.called(without_adapters(call, starts) if self._trim else call)

    def _moves(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8] | None:
        if self._ratio < 1.0:
            return None  # a stride of samples may then hold several bases
        moves = np.zeros(self.read.num_samples // self._stride, np.uint8)
        moves[starts] = 1
        return moves


def padded(length: int, chunk: int) -> int:
    """Return the size in which a stretch of signal goes through the network: a chunk, or some eighths of one.

    Always in whole chunks, short reads would cost as much as long ones; in any size, no two would go through together.
    Some nothing follows each read's end, lest its last bases depend on whether any does.
    """
    eighth = chunk // 8
    return chunk if length == chunk else -(-(length + BLOCK) // eighth) * eighth


def middle_and_spread(
    current: npt.NDArray[np.float32], strategy: str, figures: tuple[float, ...]
) -> tuple[float, float]:
    """Return what is taken from a signal's current and what it is then divided by, pA.

    Strategies and their figures, as bonito's and dorado's models name them: `pa` (mean, standard deviation), `quantile`
    (a, b, shift multiplier, scale multiplier), `med_mad` (none).
    """
    if strategy == "pa":
        return figures[0], figures[1]
    if strategy == "med_mad":
        middle = float(np.median(current))
        return middle, 1.4826 * float(np.median(np.abs(current - middle)))  # normal noise: its standard deviation
    low, high = np.quantile(current, figures[:2])
    return figures[2] * float(low + high), figures[3] * float(high - low)


def seam(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8]) -> int:
    """Return how many of its last frames to take from a chunk, before the next one's that it overlaps with.

    Both are surest in the middle. The cut comes after the base nearest to it that both have in the same frame:
    elsewhere, a base that they have in different frames, to either side of the cut, would be lost or doubled.
    """
    middle = len(before) // 2
    same = np.flatnonzero((before == after[: len(before)]) & (before > 0)) + 1
    return int(same[np.abs(same - middle).argmin()]) if len(same) else middle


def _failed(error: Exception) -> Outcome:
    return Outcome.quarantined(f"exception: {type(error).__name__}: {error}")
