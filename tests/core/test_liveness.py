"""Late, stalled, dead: by what we saw and when, whatever the clocks of the nodes say."""

from __future__ import annotations

import pytest

from tasks.core.liveness import Beat, Patience, Sighting, Verdict, excuse, gravest, judge, observe

PATIENCE = Patience(late_after=10, dead_after=60, stall_after=300, open_after=900)


def beat(time: float = 0.0, *, process: int = 1, reads: int = 0, attempt: str = "a", ready: bool = True) -> Beat:
    told = {"batch_id": "b", "reads": reads, "samples": 10 * reads, "time": time, "ready": ready}
    return Beat(worker="w", process=process, attempt=attempt, **told)


@pytest.mark.parametrize(
    ("silent", "idle", "verdict"),
    [
        (0, 0, Verdict.ALIVE),
        (9, 9, Verdict.ALIVE),
        (10, 10, Verdict.LATE),
        (59, 59, Verdict.LATE),
        (60, 60, Verdict.DEAD),
        (1, 299, Verdict.ALIVE),
        (1, 300, Verdict.STALLED),
        (9, 5000, Verdict.STALLED),
        (10, 5000, Verdict.LATE),  # silent now: it may be dying
        (60, 5000, Verdict.DEAD),
    ],
)
def test_verdicts(silent: float, idle: float, verdict: Verdict) -> None:
    sighting = Sighting(beat=beat(), changed=1000 - silent, progressed=1000 - idle)
    assert judge({"slot": sighting}, PATIENCE, now=1000) == {"slot": verdict}


def follow(*seen: tuple[float, list[Beat]]) -> dict[str, Sighting]:
    """Observe beats at our own times."""
    sightings: dict[str, Sighting] = {}
    for now, beats in seen:
        sightings = observe(sightings, beats, now=now)
    return sightings


def test_a_slot_is_as_old_as_our_first_sight_of_it() -> None:
    """The time in the beat is of another clock, here a day ahead or behind."""
    for time in (-86_400, 0, 86_400):
        (sighting,) = follow((500, [beat(time)])).values()
        assert (sighting.changed, sighting.progressed) == (500, 500)


def test_beats_without_reads_are_life_but_no_progress() -> None:
    (sighting,) = follow(
        (500, [beat(1)]), (510, [beat(2)]), (520, [beat(3, reads=4)]), (530, [beat(4, reads=4)])
    ).values()
    assert (sighting.changed, sighting.progressed) == (530, 520)


def test_an_engine_that_opens_has_more_time_than_one_that_calls() -> None:
    opening = follow((500, [beat(1, ready=False)]), (1399, [beat(2, ready=False)]))
    assert set(judge(opening, PATIENCE, now=1399).values()) == {Verdict.ALIVE}
    assert set(judge(opening, PATIENCE, now=1400).values()) == {Verdict.STALLED}
    opened = observe(opening, [beat(3)], now=1400)
    assert set(judge(opened, PATIENCE, now=1409).values()) == {Verdict.ALIVE}


def test_a_process_fares_as_the_worst_of_its_slots() -> None:
    slots = [beat(1, attempt="a"), beat(1, attempt="b"), beat(1, process=2)]
    seen = follow(
        (500, slots), (800, [beat(2, attempt="a", reads=1), beat(2, attempt="b"), beat(2, process=2, reads=1)])
    )
    found = gravest(seen, judge(seen, PATIENCE, now=800))
    assert {process: verdict for process, (_, verdict) in found.items()} == {
        ("w", 1): Verdict.STALLED,
        ("w", 2): Verdict.ALIVE,
    }
    assert found["w", 1][0].beat.attempt == "b"


def test_a_beat_that_stays_the_same_ages() -> None:
    (sighting,) = follow((500, [beat(1)]), (510, [beat(1)]), (561, [beat(1)])).values()
    assert sighting.changed == 500
    assert judge({"slot": sighting}, PATIENCE, now=561) == {"slot": Verdict.DEAD}


def test_time_in_which_nobody_looked_makes_no_slot_older() -> None:
    """Of ten minutes between two looks, the machine was suspended for all but two seconds."""
    asleep = excuse(follow((500, [beat(1)]), (505, [beat(1)])), seconds=598)
    (sighting,) = observe(asleep, [beat(1)], now=1105).values()
    assert (sighting.changed, sighting.progressed) == (1098, 1098)
    assert judge({"slot": sighting}, PATIENCE, now=1105) == {"slot": Verdict.ALIVE}
    assert judge({"slot": sighting}, PATIENCE, now=1158) == {"slot": Verdict.DEAD}


def test_a_slot_that_ended_is_forgotten() -> None:
    assert not follow((500, [beat(1)]), (510, []))


def test_a_new_attempt_of_the_same_worker_begins_anew() -> None:
    (sighting,) = follow((500, [beat(1, attempt="a")]), (580, [beat(1, attempt="b")])).values()
    assert sighting.changed == 580


def test_slots_are_judged_apart() -> None:
    sightings = follow((500, [beat(1, process=1), beat(1, process=2)]), (570, [beat(1, process=1), beat(9, process=2)]))
    assert sorted(verdict.value for verdict in judge(sightings, PATIENCE, now=571).values()) == ["alive", "dead"]
