"""The two kinds of network that the embedded engine runs: signal in, bases out, chunk by chunk, by onnxruntime."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime
from fast_ctc_decode import beam_search

from tasks.core.errors import EngineError, ShoalError
from tasks.engines import bonito, crf
from tasks.engines.catalogue import Model

Floats = npt.NDArray[np.float32]
#: Of each frame the base that comes there (0 none, 1 to 4 ACGT), uint8, and how sure the network is of it.
Calls = tuple[npt.NDArray[np.uint8], Floats]
_CODES = np.zeros(256, np.uint8)
_CODES[list(b"ACGT")] = range(1, 5)


class Network(Protocol):
    """A network with its decoder. Chunks go through it together, as many each time."""

    #: Samples per chunk, at most, and of overlap of two; chunks that go through at once.
    chunk: int
    overlap: int
    together: int
    #: What a chunk's length must be a multiple of, samples.
    unit: int

    def call(self, chunks: Floats) -> Calls:
        """Call chunks of shape (together, samples); gives arrays of shape (together, frames)."""


def open_network(model: Model, *, threads: int, int8: bool) -> Network:
    """Load a model's network.

    Raises:
        EngineError: it can't be loaded; names model and file.
    """
    if model.form == "crf":
        return _Crf(model, threads, int8=int8)
    return _Ctc(model, threads)


class _Ctc:
    """A network with CTC output, decoded by beam search: 1 % more identity than by the best symbol of each frame."""

    chunk, overlap, together = 6000, 300, 4
    #: Prefixes kept, and the probability below which a symbol is not followed.
    beam, cut = 5, 0.01

    def __init__(self, model: Model, threads: int) -> None:
        self._session = _session(model, str(model.weights), threads)
        self.unit = 2 * model.stride

    def call(self, chunks: Floats) -> Calls:
        y = self._session(chunks)
        bases = np.zeros(y.shape[:2], np.uint8)
        sure = np.zeros(y.shape[:2], np.float32)
        for i, frames in enumerate(y):
            sequence, path = beam_search(frames, "NACGT", self.beam, self.cut)
            places = np.array(path, np.int64)
            codes = _CODES[np.frombuffer(sequence.encode(), np.uint8)]
            bases[i, places] = codes
            # How sure it is of a base: its highest probability until the next one comes.
            for code in range(1, 5):
                here = np.flatnonzero(codes == code)
                if len(here):
                    edges = np.stack((places, np.append(places[1:], len(frames))), axis=1)[here].ravel()
                    column = np.append(frames[:, code], np.float32(0))
                    sure[i, places[here]] = np.maximum.reduceat(column, edges)[::2]
        return bases, sure


class _Crf:
    """An LSTM-CRF of ONT's, decoded exactly."""

    together = 8

    def __init__(self, model: Model, threads: int, *, int8: bool) -> None:
        self.unit = model.stride
        self.chunk, self.overlap = (samples // self.unit * self.unit for samples in (8000, 500))
        try:
            network = bonito.build_network(model.weights, int8=int8)
        except ShoalError as error:
            raise EngineError(str(error)) from error
        self._session = _session(model, network, threads)
        self._stay = model.stay

    def call(self, chunks: Floats) -> Calls:
        return crf.decode(self._session(chunks), self._stay)


def _session(model: Model, network: str | bytes, threads: int) -> Any:
    """Open a session; the same thread count gives the same bytes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class per cause, without a common base
        raise EngineError(f"model {model.name}: {model.weights} can't be loaded: {error}") from error

    def run(chunks: Floats) -> Floats:
        try:
            (y,) = session.run(None, {"x": chunks[:, None]})
        except Exception as error:  # as above: no common base
            raise EngineError(f"model {model.name}: onnxruntime failed: {error}") from error
        found: Floats = y
        return found

    return run
