from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.calls import Fate
from tasks.core.errors import ChemistryError
from tasks.core.reads import Read
from tasks.engines.registry import check_run, open_engine
from tasks.formats.pod5 import read_rows, scan_pod5
from tasks.settings import EngineSettings
from tests.data import library, shared
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


def test_other_chemistries_are_refused() -> None:
    check_run(SCRAPPIE, run_info(flow_cell_product_code="FLO-MIN106", sequencing_kit="sqk-lsk109", sample_rate=4000))
    with pytest.raises(ChemistryError, match=r"scrappie calls R9\.4\.1"):
        check_run(SCRAPPIE, run_info())
