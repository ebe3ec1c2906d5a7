"""What every engine promises, tried on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tasks.core.calls import Fate, Outcome, mean_qscore
from tasks.core.errors import ShoalError
from tasks.core.reads import Read
from tasks.engines.base import Engine
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tasks.engines.null import NullEngine
from tasks.engines.scrappie import ScrappieEngine
from tests.data import missing
from tests.engines.bonito_form import random_weights, write_model
from tests.engines.squiggles import squiggle
from tests.making import run_info


def _model_directory(*, int8: bool = False) -> Engine:
    with TemporaryDirectory() as folder:
        model = find_model(str(write_model(Path(folder), random_weights(), form="dorado")))
        return CpuEngine(model, moves=True, int8=int8)


def _scrappie() -> Engine:
    try:
        return ScrappieEngine()
    except ShoalError as error:
        missing(str(error))


ENGINES: dict[str, Callable[[], Engine]] = {
    "cpu": lambda: CpuEngine(find_model(None), moves=True),
    "cpu, 2 threads": lambda: CpuEngine(find_model(None), threads=2, moves=True),
    "cpu, model directory": _model_directory,
    "cpu, model directory, int8": lambda: _model_directory(int8=True),
    "scrappie": _scrappie,
    "null": NullEngine,
    "null at a rate": lambda: NullEngine(5e7, in_flight_samples=1_000_000),
}
LENGTHS = (5000, 12_000, 10, 700, 6000, 6001, 30_000, 99, 100, 2400)

#: Everything of a call that must not change.
Bytes = tuple[str, str, list[tuple[bytes, bytes, float, bytes]]]


@pytest.fixture(params=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    opened = ENGINES[request.param]()
    yield opened
    opened.close()
    opened.close()


def reads(*, rate: int = 5000) -> list[Read]:
    run = run_info(sample_rate=rate)
    return [squiggle(length, number=i + 1, run=run) for i, length in enumerate(LENGTHS)]


def in_bytes(outcome: Outcome) -> Bytes:
    return (
        outcome.fate.value,
        outcome.reason,
        [(c.sequence, c.qstring, c.mean_qscore, b"" if c.moves is None else c.moves.tobytes()) for c in outcome.calls],
    )


def test_answers_each_read_once(engine: Engine) -> None:
    given = reads()
    answered = list(engine.basecall(given))
    assert sorted(r.read_id for r, _ in answered) == sorted(r.read_id for r in given)
    assert {id(r) for r, _ in answered} == {id(r) for r in given}
    assert any(outcome.fate is Fate.CALLED for _, outcome in answered)


def test_calls_are_whole(engine: Engine) -> None:
    for given, outcome in engine.basecall(reads()):
        assert bool(outcome.calls) == (outcome.fate is Fate.CALLED) == (not outcome.reason)
        for call in outcome.calls:
            assert call.parent_read_id == given.read_id
            assert call.num_samples == given.num_samples
            assert len(call.sequence) == len(call.qstring) > 0
            assert set(call.sequence) <= set(b"ACGT")
            assert min(call.qstring) >= 33 + 1
            assert max(call.qstring) <= 33 + 50
            assert call.mean_qscore == pytest.approx(mean_qscore(call.qstring), abs=1e-6)
            assert call.stride == engine.identity.stride
            if call.moves is not None:
                assert call.moves.dtype == np.uint8
                assert len(call.moves) == given.num_samples // call.stride
                assert int(call.moves.sum()) == len(call.sequence)


def test_no_reads(engine: Engine) -> None:
    assert list(engine.basecall([])) == []


def test_pulls_only_as_it_has_room(engine: Engine) -> None:
    pulled = 0

    def endless() -> Iterator[Read]:
        nonlocal pulled
        for number in count(1):
            pulled += 1
            yield squiggle(20_000, number=number)

    answers = engine.basecall(endless())
    assert pulled == 0
    for answered in range(1, 12):
        next(answers)
        assert pulled - answered <= 60


@pytest.mark.parametrize("rate", [4000, 5000])
def test_same_bytes_whatever_the_neighbours(engine: Engine, rate: int) -> None:
    given = reads(rate=rate)
    alone = {r.read_id: in_bytes(o) for one in given for r, o in engine.basecall([one])}
    assert {r.read_id: in_bytes(o) for r, o in engine.basecall(given)} == alone
    assert {r.read_id: in_bytes(o) for r, o in engine.basecall(reversed(given))} == alone


def test_same_bytes_from_another_engine(request: pytest.FixtureRequest, engine: Engine) -> None:
    first = [in_bytes(o) for _, o in engine.basecall(reads())]
    second = ENGINES[request.node.callspec.params["engine"]]()
    assert [in_bytes(o) for _, o in second.basecall(reads())] == first


def test_threads_at_once(engine: Engine) -> None:
    expected = [in_bytes(o) for _, o in engine.basecall(reads())]
    with ThreadPoolExecutor(3) as threads:
        slots = [threads.submit(lambda: [in_bytes(o) for _, o in engine.basecall(reads())]) for _ in range(3)]
        assert all(slot.result() == expected for slot in slots)


def test_a_failure_of_the_source_is_passed_on(engine: Engine) -> None:
    def broken() -> Iterator[Read]:
        yield squiggle(5000)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(engine.basecall(broken()))


def test_a_bad_read_is_answered_and_others_go_on(engine: Engine) -> None:
    bad = replace(squiggle(20_000, number=2), run=run_info(sample_rate=0))
    good = [squiggle(20_000, number=1), squiggle(20_000, number=3)]
    outcomes = {r.read_id: o for r, o in engine.basecall([good[0], bad, good[1]])}
    assert len(outcomes) == 3
    assert all(outcomes[r.read_id].fate is Fate.CALLED for r in good)
