"""What comes out: calls, and the one fate of each read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from tasks.core.reads import Read


class Fate(str, Enum):
    """What became of an input read. Every read has exactly one."""

    CALLED = "called"
    SKIPPED = "skipped"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """What called the reads: goes into headers, summaries and provenance."""

    #: `cpu`, `null`, …
    engine: str
    #: Version of the engine's program or library.
    version: str
    #: Name of the model as written into FASTQ headers (`basecall_model_version_id`).
    model: str
    #: sha256 of the model's file, hex; empty where there is none.
    model_digest: str
    #: Samples per move.
    stride: int
    #: GPU names, `_` for spaces; empty on CPU.
    gpu: str = ""
    #: Names of the modified-base models.
    modified_base_models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModifiedBases:
    """Modified bases of one call, as SAM has them (SAM optional fields specification, section 1.7)."""

    #: Value of the `MM` tag, e.g. `C+h?,5,12;C+m?,5,12;`.
    positions: str
    #: Value of the `ML` tag: probabilities in 256ths, uint8, in the order of `positions`.
    probabilities: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Barcode:
    """What demultiplexing found in one call."""

    #: `barcode01`, …, or `unclassified`.
    arrangement: str
    #: Kit the barcode is of; empty when unclassified.
    kit: str = ""
    variant: str = ""
    #: From the sample sheet; empty without one.
    alias: str = ""
    #: From the sample sheet (`test_sample`, …); empty without one.
    type: str = ""
    score: float = -1.0
    front_score: float = -1.0
    front_foundseq_length: int = -1
    front_begin_index: int = -1
    rear_score: float = -1.0
    rear_foundseq_length: int = -1
    rear_end_index: int = -1

    @property
    def folder(self) -> str:
        """Name of the folder and of the read group: the alias, else the arrangement."""
        return self.alias or self.arrangement


@dataclass(frozen=True, slots=True, kw_only=True)
class PolyTail:
    """A poly-A or poly-T tail: dorado's tags `pt` and `pa`."""

    #: Bases; -1: the tail was not found, 0: its length can't be told.
    length: int
    #: Samples from the start of the read: anchor, then start and end of the tail and of a second part; -1: none.
    anchor: int = -1
    start: int = -1
    end: int = -1
    start_2: int = -1
    end_2: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class BasecalledRead:
    """One sequence called from a read; a read that the engine splits gives several."""

    read_id: str
    #: Id of the read in the POD5 file; differs from `read_id` only in split reads.
    parent_read_id: str
    #: A, C, G, T (U in RNA on request), ASCII.
    sequence: bytes
    #: Phred scores + 33, ASCII, as long as `sequence`.
    qstring: bytes
    #: Phred of the mean error probability.
    mean_qscore: float
    #: Samples per move; the model's stride.
    stride: int
    #: Samples cut from the front before calling; the move table starts there.
    trimmed_samples: int = 0
    #: First sample of this call in its parent; 0 unless split.
    split_point: int = 0
    #: Samples this call covers, the trimmed ones included.
    num_samples: int
    #: uint8, shape (strides,): 1 where a base starts. None unless asked for.
    moves: npt.NDArray[np.uint8] | None = None
    #: Middle and spread of the signal scaling; their meaning is `scaling_version`.
    scaling_midpoint: float = 0.0
    scaling_dispersion: float = 0.0
    scaling_version: str = "quantile"
    modified: ModifiedBases | None = None
    #: None: the engine was not asked to demultiplex.
    barcode: Barcode | None = None
    #: None: the engine was not asked to look for one.
    poly_tail: PolyTail | None = None
    #: Lines of SAM, the primary one first, as the engine's aligner wrote them; None: it was not asked to align.
    alignments: tuple[str, ...] | None = None
    #: Ids of the template and complement reads that this duplex call is made of.
    duplex_parents: tuple[str, str] | None = None
    #: Tag `dx`: 1 duplex, 0 simplex, -1 simplex that is also part of a duplex call.
    duplex: int = 0

    @property
    def split(self) -> bool:
        """Whether the engine cut the read in several."""
        return self.read_id != self.parent_read_id

    def end_reason(self, read: Read) -> str:
        """Return why the signal of this call ended: as its read, unless it was cut off before the read's end."""
        cut_off = self.split and self.split_point + self.num_samples < read.num_samples
        return "unknown" if cut_off else read.end_reason


@dataclass(frozen=True, slots=True)
class Outcome:
    """An engine's answer to one read: calls, or the reason there are none."""

    fate: Fate
    reason: str = ""
    calls: tuple[BasecalledRead, ...] = ()

    @classmethod
    def called(cls, *calls: BasecalledRead) -> Outcome:
        """Answer with one or more calls; with none the read is skipped as `no_bases`."""
        return cls(Fate.CALLED, "", calls) if calls else cls.skipped("no_bases")

    @classmethod
    def skipped(cls, reason: str) -> Outcome:
        """Answer that there is nothing to call, by a rule (`too_short`, `dead_signal`)."""
        return cls(Fate.SKIPPED, reason)

    @classmethod
    def quarantined(cls, reason: str) -> Outcome:
        """Answer that calling this read failed, and why."""
        return cls(Fate.QUARANTINED, reason)


#: Error probability of each qstring byte; index is the byte. Phred: p = 10^(-q/10).
ERROR_PROBABILITY = 10.0 ** (-(np.arange(256) - 33.0) / 10.0)


def mean_qscore(qstring: bytes) -> float:
    """Return the Phred score of the mean error probability of a qstring.

    This is the definition of MinKNOW and dorado: the mean is taken over probabilities, not over scores. Empty gives 0.
    """
    if not qstring:
        return 0.0
    mean = float(ERROR_PROBABILITY[np.frombuffer(qstring, np.uint8)].mean())
    return -10.0 * float(np.log10(mean))
