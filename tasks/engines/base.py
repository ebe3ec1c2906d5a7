"""The engine protocol: a stream of reads in, a stream of answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from tasks.core.calls import Outcome
from tasks.core.reads import Read


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


class Engine(Protocol):
    """Opened once per worker; its slots call `basecall` from threads of their own, at the same time.

    An engine pulls reads only as fast as it has room, bounded in samples: that is the back-pressure. It may answer in
    any order. It answers each read exactly once, or raises EngineError. What goes wrong inside one read is that
    read's answer (`Outcome.quarantined`), never an exception.
    """

    identity: EngineIdentity

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read once with its answer. Ends when `reads` has ended and all are answered."""

    def close(self) -> None:
        """Free what the engine holds. Harmless when called twice."""
