"""Engine for R9.4.1 reads of old archives: scrappie (nanoporetech/scrappie, MPL 2.0), an optional package.

scrappie decides on the 5-mer in the pore for each block of five samples and gives no scores of bases. Here a base's
score is the network's own probability of the likeliest 5-mer, over the blocks that the base is called from.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from tasks.core.adapters import without_adapters
from tasks.core.calls import BasecalledRead, EngineIdentity, Outcome, mean_qscore
from tasks.core.chemistry import Fits
from tasks.core.errors import EngineError, SettingsError
from tasks.core.reads import Read

NAME = "rgrgr_r94"
FITS = Fits(molecule="dna", pores=("R9.4.1",), speeds=(450,), sample_rates=(4000,))
MIN_QSCORE = 5.0
STRIDE = 5
#: A rough figure per CPU core, for estimates.
SAMPLES_PER_SECOND = 150_000
#: Samples that are called at once, at most, in some 500 MB, and of overlap of two pieces.
PIECE, OVERLAP = 200_000, 2_000
#: Reads shorter than this are not called: scrappie trims 200 samples at the front and 10 at the end.
MIN_SAMPLES = 400


def scrappie_identity() -> EngineIdentity:
    """Tell who calls, without loading it.

    Raises:
        SettingsError: scrappie is not installed.
    """
    return EngineIdentity(
        engine="scrappie", version=_version(), model=f"scrappie_{NAME}", model_digest="", stride=STRIDE
    )


def _version() -> str:
    try:
        return version("scrappie")
    except ModuleNotFoundError as error:
        raise SettingsError(
            "the scrappie engine needs the package scrappie: pip install 'shoal[scrappie]' "
            "(builds with a C compiler and OpenBLAS's headers; Debian: libopenblas-dev)"
        ) from error


class ScrappieEngine:
    """Calls reads one by one on this process's CPU."""

    def __init__(self, *, trim: bool = False) -> None:
        self.identity = scrappie_identity()
        self._trim = trim
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # slots are its parallelism; BLAS threads fight over them
        try:
            import scrappy
        except ImportError as error:
            raise EngineError(f"scrappie is installed and can't be loaded: {error}") from error
        self._scrappy = scrappy

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read with its answer, in order."""
        for read in reads:
            yield read, self._answer(read)

    def close(self) -> None:
        """Hold nothing that needs closing."""

    def _answer(self, read: Read) -> Outcome:
        if read.num_samples < MIN_SAMPLES:
            return Outcome.skipped("too_short")
        current = read.picoamperes()
        if not np.ptp(current) > 0:
            return Outcome.skipped("dead_signal")
        try:
            return self._call(read, current)
        except Exception as error:  # of one read; the others go on
            return Outcome.quarantined(f"exception: {type(error).__name__}: {error}")

    def _call(self, read: Read, current: npt.NDArray[np.float32]) -> Outcome:
        raw = self._scrappy.RawTable(current)
        raw.trim().scale()
        if raw.end - raw.start < MIN_SAMPLES:
            return Outcome.skipped("dead_signal")
        pieces = list(self._pieces(raw.data(as_numpy=True)))
        if not pieces:
            return Outcome.skipped("no_bases")
        sequences, qstrings, starts = zip(*pieces, strict=True)
        qstring = b"".join(qstrings)
        call = BasecalledRead(
            read_id=read.read_id,
            parent_read_id=read.read_id,
            sequence=b"".join(sequences),
            qstring=qstring,
            mean_qscore=mean_qscore(qstring),
            stride=STRIDE,
            trimmed_samples=int(raw.start),
            num_samples=read.num_samples,
            scaling_version="med_mad",
        )
        return Outcome.called(without_adapters(call, np.concatenate(starts)) if self._trim else call)

    def _pieces(self, scaled: npt.NDArray[np.float32]) -> Iterator[tuple[bytes, bytes, npt.NDArray[np.int64]]]:
        """Yield bases, qstring, and each base's first block, piece by piece: scrappie keeps 1,025 figures per block.

        Two pieces meet in the middle of what both see, by the base at which each has the 5-mer of that block begin.
        """
        starts = range(0, max(len(scaled) - OVERLAP, 1), PIECE - OVERLAP)
        middle = OVERLAP // 2 // STRIDE
        for start in starts:
            piece = self._scrappy.RawTable(scaled[start : start + PIECE])
            posterior = self._scrappy.calc_post(piece, NAME, log=True)
            sequence, _, places = self._scrappy.decode_post(posterior, NAME)
            if not sequence:
                continue
            likeliest = np.exp(posterior.data(as_numpy=True).max(axis=1))
            places = np.asarray(places)
            qstring = _scores(likeliest, places, len(sequence))
            starts_of_bases = np.searchsorted(places, np.arange(len(sequence))) + start // STRIDE
            first = int(places[middle]) if start else 0
            last = len(sequence) if start == starts[-1] else int(places[PIECE // STRIDE - middle])
            yield sequence[first:last].encode(), qstring[first:last], starts_of_bases[first:last]


def _scores(likeliest: npt.NDArray[np.float32], places: npt.NDArray[Any], bases: int) -> bytes:
    """Return the qstring: block i shows the 5-mer that begins at base `places[i]`."""
    count = min(len(likeliest), len(places))
    sure = np.full(bases, np.nan)
    first = np.clip(places[:count], 0, bases - 1)
    sums = np.bincount(first, weights=likeliest[:count], minlength=bases)
    seen = np.bincount(first, minlength=bases)
    np.divide(sums, seen, out=sure, where=seen > 0)
    known = np.flatnonzero(seen)
    sure = np.interp(np.arange(bases), known, sure[known])
    phred = np.clip(np.round(-10 * np.log10(np.maximum(1 - sure, 1e-4))), 1, 40).astype(np.uint8)
    return bytes(phred + 33)
