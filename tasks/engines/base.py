"""The engine protocol: a stream of reads in, a stream of answers out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from tasks.core.calls import EngineIdentity, Outcome
from tasks.core.reads import Read


class Engine(Protocol):
    """Opened once per worker; its slots call `basecall` from threads of their own, at the same time.

    An engine pulls reads only as fast as it has room, bounded in samples: that is the back-pressure. It pulls them in
    the thread that iterates over its answers, and may answer in any order. It answers each read exactly once, or raises
    EngineError. What goes wrong inside one read is that read's answer (`Outcome.quarantined`), never an exception.
    """

    identity: EngineIdentity

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read once with its answer. Ends when `reads` has ended and all are answered."""

    def close(self) -> None:
        """Free what the engine holds. Harmless when called twice."""
