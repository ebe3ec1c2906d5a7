"""How right scrappie's calls are.

    python -m tests.benchmarks.scrappie

Calls slorado's 100 amplicon reads (R9.4.1, 4 kHz; MIT) and maps the calls to their reference by mappy: how many map,
and matches per alignment column of each one's longest hit.
"""

from __future__ import annotations

from collections.abc import Iterable

import mappy
from rich.console import Console

from tasks.core.calls import Outcome
from tasks.core.reads import Read
from tasks.engines.registry import open_engine
from tasks.settings import EngineSettings
from tests.benchmarks.accuracy import reads_of
from tests.data import shared


def reads() -> list[Read]:
    """Return the reads."""
    return reads_of(shared("data", "r9_4khz", "slorado_corona_r9.pod5"), ("",))


def mapped_identity(outcomes: Iterable[Outcome]) -> tuple[int, float]:
    """Map what was called; return how many calls map, and their identity."""
    reference = next(mappy.fastx_read(str(shared("data", "r9_4khz", "nCoV-2019.reference.fasta"))))[1]
    aligner = mappy.Aligner(seq=reference, preset="map-ont")
    matches = columns = mapped = 0
    for outcome in outcomes:
        hits = list(aligner.map(outcome.calls[0].sequence.decode())) if outcome.calls else []
        if hits:
            best = max(hits, key=lambda hit: int(hit.blen))
            mapped, matches, columns = mapped + 1, matches + best.mlen, columns + best.blen
    return mapped, matches / columns


def main() -> None:
    """Measure, and print."""
    given, engine = reads(), open_engine(EngineSettings(kind="scrappie"))
    mapped, identity = mapped_identity(outcome for _, outcome in engine.basecall(given))
    Console().print(f"{mapped} of {len(given)} mapped, identity {identity:.4f}")


if __name__ == "__main__":
    main()
