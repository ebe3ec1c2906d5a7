from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.core.calls import Fate, mean_qscore
from tasks.engines.null import NullEngine
from tests.making import read


def test_one_base_per_12_and_a_half_samples() -> None:
    ((_, outcome),) = NullEngine().basecall([read(5000)])
    assert len(outcome.calls[0].sequence) == 400


def test_too_short() -> None:
    ((_, outcome),) = NullEngine().basecall([read(12)])
    assert (outcome.fate, outcome.reason) == (Fate.SKIPPED, "too_short")


def test_some_reads_fail() -> None:
    scores = [o.calls[0].mean_qscore for _, o in NullEngine().basecall(read(10_000, number=i) for i in range(300))]
    assert 0 < sum(score < 9 for score in scores) < 150


def test_a_read_longer_than_the_ring() -> None:
    ((_, outcome),) = NullEngine().basecall([read(30_000_000)])
    call = outcome.calls[0]
    assert len(call.sequence) == len(call.qstring) == 2_400_000
    assert call.mean_qscore == pytest.approx(mean_qscore(call.qstring))


def test_rate_is_shared_by_slots_and_busy_time_is_exact() -> None:
    engine = NullEngine(1e6)
    assert engine.busy == (0.0, 0.0)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as slots:
        list(slots.map(lambda first: list(engine.basecall(read(20_000, number=first + i) for i in range(5))), (1, 100)))
    took = time.monotonic() - began
    assert took >= 0.2
    busy, span = engine.busy
    assert busy == pytest.approx(0.2)
    assert engine.busy_seconds == busy
    assert busy <= span + 1e-9 <= took + 2e-9


def test_busy_time_counts_only_what_is_done_and_stops_when_idle() -> None:
    engine = NullEngine(1e6)
    # A second of work: the engine has none while a busy machine keeps us from giving it the second read.
    answers = engine.basecall([read(1_000_000, number=1), read(30_000_000, number=2)])
    next(answers)
    busy, span = engine.busy
    assert busy == pytest.approx(span)
    assert busy < 30
    answers.close()  # type: ignore[attr-defined]  # a generator

    idle = NullEngine(1e6)
    list(idle.basecall([read(10_000, number=1)]))
    time.sleep(0.05)
    list(idle.basecall([read(10_000, number=2)]))
    busy, span = idle.busy
    assert busy == pytest.approx(0.02)
    assert span >= 0.07


def test_holds_no_more_than_it_may() -> None:
    pulled = 0

    def source():  # type: ignore[no-untyped-def]
        nonlocal pulled
        for number in range(1, 100):
            pulled += 1
            yield read(10_000, number=number)

    answers = NullEngine(1e6, in_flight_samples=50_000).basecall(source())
    next(answers)
    assert pulled <= 6
    answers.close()  # type: ignore[attr-defined]  # a generator
