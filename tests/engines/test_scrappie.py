from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.calls import Fate
from tasks.core.errors import ChemistryError
from tasks.core.reads import Read
from tasks.engines import scrappie
from tasks.engines.registry import check_run, open_engine
from tasks.formats.pod5 import read_rows, scan_pod5
from tasks.settings import EngineSettings
from tests.data import library, shared
from tests.engines.test_bonito import edits
from tests.making import run_info

SCRAPPIE = EngineSettings(kind="scrappie")


def reads_of(path: Path) -> list[Read]:
    rows = read_rows(str(path), 0, len(scan_pod5(path).read_ids))
    return [read for read in rows if isinstance(read, Read)]


def test_r9_amplicons_map_to_their_reference() -> None:
    library("scrappy")
    mappy = library("mappy")
    reference = next(mappy.fastx_read(str(shared("data", "r9_4khz", "nCoV-2019.reference.fasta"))))[1]
    aligner = mappy.Aligner(seq=reference, preset="map-ont")
    matches = columns = mapped = 0
    engine = open_engine(SCRAPPIE)
    for read, outcome in engine.basecall(reads_of(shared("data", "r9_4khz", "slorado_corona_r9.pod5"))):
        assert outcome.fate is Fate.CALLED
        (call,) = outcome.calls
        assert len(call.qstring) == len(call.sequence)
        assert 0 < call.trimmed_samples < call.num_samples == read.num_samples
        hits = list(aligner.map(call.sequence.decode()))
        if hits:
            best = max(hits, key=lambda hit: int(hit.blen))
            mapped, matches, columns = mapped + 1, matches + best.mlen, columns + best.blen
    assert mapped >= 98
    assert matches / columns > 0.885


def test_where_pieces_of_a_long_read_meet_a_few_bases_change_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    library("scrappy")
    reads = [read for read in reads_of(shared("data", "r9_4khz", "slorado_corona_r9.pod5")) if read.num_samples > 5200]
    engine = open_engine(SCRAPPIE)
    whole = [outcome.calls[0] for _, outcome in engine.basecall(reads)]
    monkeypatch.setattr(scrappie, "PIECE", 5000)  # reads of millions of samples are not tried here
    monkeypatch.setattr(scrappie, "OVERLAP", 1000)
    assert len(reads) >= 10
    pieces = [outcome.calls[0] for _, outcome in engine.basecall(reads)]
    assert all(len(call.qstring) == len(call.sequence) for call in pieces)
    changed = sum(edits(call.sequence, other.sequence) for call, other in zip(whole, pieces, strict=True))
    assert 0 < changed <= 10 * len(reads)  # a seam or two each


def test_other_chemistries_are_refused() -> None:
    check_run(SCRAPPIE, run_info(flow_cell_product_code="FLO-MIN106", sequencing_kit="sqk-lsk109", sample_rate=4000))
    with pytest.raises(ChemistryError, match=r"scrappie calls R9\.4\.1"):
        check_run(SCRAPPIE, run_info())
