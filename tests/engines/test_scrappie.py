from __future__ import annotations

import pytest

from tasks.core.calls import Fate, Outcome
from tasks.core.errors import ChemistryError
from tasks.core.reads import Read
from tasks.engines import scrappie
from tasks.engines.registry import check_run, open_engine
from tasks.engines.scrappie import ScrappieEngine
from tasks.settings import EngineSettings
from tests.data import library
from tests.engines.test_bonito import edits
from tests.making import run_info

SCRAPPIE = EngineSettings(kind="scrappie")


@pytest.fixture(scope="module")
def reads() -> list[Read]:
    library("scrappy")
    library("mappy")
    from tests.benchmarks import scrappie as benchmark

    return benchmark.reads()


@pytest.fixture(scope="module")
def outcomes(reads: list[Read]) -> list[Outcome]:
    return [outcome for _, outcome in open_engine(SCRAPPIE).basecall(reads)]


def test_r9_amplicons_map_to_their_reference(reads: list[Read], outcomes: list[Outcome]) -> None:
    from tests.benchmarks.scrappie import mapped_identity

    for read, outcome in zip(reads, outcomes, strict=True):
        assert outcome.fate is Fate.CALLED
        (call,) = outcome.calls
        assert len(call.qstring) == len(call.sequence)
        assert 0 < call.trimmed_samples < call.num_samples == read.num_samples
    mapped, identity = mapped_identity(outcomes)
    assert mapped >= 98
    assert identity > 0.89


def test_adapters_are_cut_off(reads: list[Read], outcomes: list[Outcome]) -> None:
    """At the rear above all: scrappie passes over the first 200 samples of a read, in which the adapter begins."""
    ends = set()
    for outcome, as_called in zip(outcomes, ScrappieEngine().basecall(reads), strict=True):
        (cut,), (whole,) = outcome.calls, as_called[1].calls
        at = whole.sequence.find(cut.sequence)
        assert whole.qstring[at : at + len(cut.qstring)] == cut.qstring
        assert 0 <= cut.trimmed_samples - whole.trimmed_samples < 5000  # some stand still for a while
        assert (at > 0) == (cut.trimmed_samples > whole.trimmed_samples)
        ends |= {("front", cut.read_id)} if at else set()
        ends |= {("rear", cut.read_id)} if at + len(cut.sequence) < len(whole.sequence) else set()
    assert sum(end == "front" for end, _ in ends) >= 10
    assert sum(end == "rear" for end, _ in ends) >= 20


def test_where_pieces_of_a_long_read_meet_a_few_bases_change_at_most(
    reads: list[Read], outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrappie, "PIECE", 5000)  # reads of millions of samples are not tried here
    monkeypatch.setattr(scrappie, "OVERLAP", 1000)
    both = zip(reads, outcomes, strict=True)
    whole = {id(read): outcome.calls[0] for read, outcome in both if read.num_samples > 5200}
    assert len(whole) >= 10
    changed = 0
    for read, outcome in open_engine(SCRAPPIE).basecall(read for read in reads if id(read) in whole):
        (call,) = outcome.calls
        assert len(call.qstring) == len(call.sequence)
        changed += edits(call.sequence, whole[id(read)].sequence)
    assert 0 < changed <= 10 * len(whole)  # a seam or two each


def test_other_chemistries_are_refused() -> None:
    check_run(SCRAPPIE, run_info(flow_cell_product_code="FLO-MIN106", sequencing_kit="sqk-lsk109", sample_rate=4000))
    with pytest.raises(ChemistryError, match=r"scrappie calls R9\.4\.1"):
        check_run(SCRAPPIE, run_info())
