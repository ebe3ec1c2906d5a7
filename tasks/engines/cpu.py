"""The embedded engine: a small CTC network on any CPU, by onnxruntime.

Signal is scaled by quantiles of the samples that lie in the pore's range, cut into overlapping chunks, and chunks of
several reads go through the network together, always in the same shape, so that a read's bases do not depend on its
neighbours. Greedy CTC decoding: the best symbol of each frame, repeats and blanks dropped.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import onnxruntime

from tasks.core.calls import BasecalledRead, Outcome, mean_qscore
from tasks.core.errors import EngineError
from tasks.core.reads import Read
from tasks.engines.base import EngineIdentity
from tasks.engines.catalogue import Model

logger = logging.getLogger(__name__)

#: Samples per chunk and of overlap, at the model's sample rate; multiples of twice the stride.
CHUNK, OVERLAP = 6000, 600
#: Chunks that go through the network at once.
CHUNKS = 8
#: Reads shorter than this are not called; ONT's server does the same.
MIN_SAMPLES = 100
#: pA of a strand in the pore; open pore and dead channel lie outside.
IN_PORE = (30.0, 200.0)
#: Samples that the scaling quantiles are taken of, at most.
SCALING_SAMPLES = 200_000
#: Phred score of a base from the network's own error estimate: slope and offset that make the mean error of the
#: training reads come out right.
CALIBRATION = (0.32, 3.7)
_ALPHABET = np.frombuffer(b"NACGT", np.uint8)


class CpuEngine:
    """Calls reads on this process's CPU. Holds a few chunks of signal beside the read it is given."""

    def __init__(self, model: Model, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                str(model.weights), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a class per cause, without a common base
            raise EngineError(f"model {model.name}: {model.weights} can't be loaded: {error}") from error
        self._model = model
        self.identity = EngineIdentity(
            engine="cpu",
            version=version("shoal"),
            model=model.name,
            model_digest=model.digest,
            stride=model.stride,
        )

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read with its answer, in order."""
        waiting: deque[_Calling] = deque()
        chunks: list[tuple[_Calling, npt.NDArray[np.float32]]] = []
        for read in reads:
            calling = _Calling(read, self._model)
            waiting.append(calling)
            for chunk in calling.chunks():
                chunks.append((calling, chunk))
                if len(chunks) == CHUNKS:
                    self._run(chunks)
            while waiting and waiting[0].finished:
                done = waiting.popleft()
                yield done.read, done.outcome()
        if chunks:
            self._run(chunks)
        while waiting:
            done = waiting.popleft()
            yield done.read, done.outcome()

    def close(self) -> None:
        """Hold nothing that needs closing."""

    def _run(self, chunks: list[tuple[_Calling, npt.NDArray[np.float32]]]) -> None:
        """Put chunks through the network, in the one shape used, and hand the frames back."""
        x = np.zeros((CHUNKS, 1, CHUNK), np.float32)
        for i, (_, chunk) in enumerate(chunks):
            x[i, 0, : len(chunk)] = chunk
        (y,) = self._session.run(None, {"x": x})
        symbols = y.argmax(axis=2).astype(np.uint8)
        best = np.take_along_axis(y, symbols[:, :, None].astype(np.int64), axis=2)[:, :, 0]
        for i, (calling, chunk) in enumerate(chunks):
            frames = len(chunk) // self._model.stride
            calling.take(symbols[i, :frames], best[i, :frames])
        chunks.clear()


class _Calling:
    """One read on its way through the network."""

    def __init__(self, read: Read, model: Model) -> None:
        self.read = read
        self._stride = model.stride
        self._ratio = read.run.sample_rate / model.sample_rate
        #: Samples at the model's rate, whole frames of the trunk.
        self._length = int(read.num_samples / self._ratio) // (2 * model.stride) * (2 * model.stride)
        self._symbols: list[npt.NDArray[np.uint8]] = []
        self._best: list[npt.NDArray[np.float16]] = []
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
        except Exception as error:  # of one read; the others go on
            logger.exception("read %s can't be scaled", self.read.read_id)
            self._early = Outcome.quarantined(f"{type(error).__name__}: {error}")
        if self._early:
            return
        self._whole = False
        for start in range(0, max(self._length - OVERLAP, 1), CHUNK - OVERLAP):
            self._left += 1
            stop = min(start + CHUNK, self._length)
            self._whole = stop == self._length
            yield self._signal(start, stop)

    def take(self, symbols: npt.NDArray[np.uint8], best: npt.NDArray[np.float32]) -> None:
        """Take a chunk's frames, in order; each seam lies in the middle of its overlap."""
        self._left -= 1
        half = OVERLAP // 2 // self._stride
        lo = half if self._symbols else 0
        hi = len(symbols) if self.finished else len(symbols) - half
        self._symbols.append(symbols[lo:hi].copy())
        self._best.append(best[lo:hi].astype(np.float16))

    def outcome(self) -> Outcome:
        """Decode what came back."""
        if self._early:
            return self._early
        try:
            return self._decode()
        except Exception as error:  # of one read; the others go on
            logger.exception("read %s can't be decoded", self.read.read_id)
            return Outcome.quarantined(f"{type(error).__name__}: {error}")

    def _scale(self) -> Outcome | None:
        """Find the scaling; return the outcome when there is nothing to call."""
        read = self.read
        if read.num_samples < MIN_SAMPLES or self._length < 2 * self._stride:
            return Outcome.skipped("too_short")
        step = -(-read.num_samples // SCALING_SAMPLES)
        sampled = (read.signal[::step] + np.float32(read.calibration_offset)) * np.float32(read.calibration_scale)
        in_pore = sampled[(sampled > IN_PORE[0]) & (sampled < IN_PORE[1])]
        if len(in_pore) * step < MIN_SAMPLES:
            return Outcome.skipped("dead_signal")
        low, high = np.quantile(in_pore, (0.2, 0.9))
        if not high > low:
            return Outcome.skipped("dead_signal")
        self._middle, self._spread = 0.51 * float(low + high), 0.53 * float(high - low)
        return None

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
        return np.clip(raw * scale + shift, -4.0, 4.0)

    def _decode(self) -> Outcome:
        symbols = np.concatenate(self._symbols)
        best = np.concatenate(self._best)
        changed = np.diff(symbols.astype(np.int8), prepend=np.int8(0)) != 0
        first = np.flatnonzero(changed & (symbols > 0))
        if not len(first):
            return Outcome.skipped("no_bases")
        error = np.maximum(1.0 - best[first].astype(np.float32), 1e-4)
        slope, offset = CALIBRATION
        scores = np.clip(np.round(slope * -10.0 * np.log10(error) + offset), 1, 50).astype(np.uint8)
        qstring = (scores + 33).tobytes()
        return Outcome.called(
            BasecalledRead(
                read_id=self.read.read_id,
                parent_read_id=self.read.read_id,
                sequence=_ALPHABET[symbols[first]].tobytes(),
                qstring=qstring,
                mean_qscore=mean_qscore(qstring),
                stride=self._stride,
                num_samples=self.read.num_samples,
                scaling_midpoint=self._middle,
                scaling_dispersion=self._spread,
            )
        )
