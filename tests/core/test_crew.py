from __future__ import annotations

from tasks.core.crew import FAILURES, Ended, died, figures_of, slow_workers, to_set_aside
from tasks.core.liveness import Beat


def ended(worker: str, *failed: str) -> Ended:
    return Ended(worker=worker, host=f"host-{worker}", failed=frozenset(failed), cause="no GPU" if failed else "")


def test_a_worker_on_which_bundle_after_bundle_fails_is_set_aside() -> None:
    history = [ended("good"), ended("bad", "1"), ended("bad", "2")]
    assert to_set_aside(history, (), most_workers=2) is None
    found = to_set_aside([*history, ended("bad", "3")], (), most_workers=2)
    assert found is not None
    assert (found.worker, found.failures) == ("bad", FAILURES)
    assert str(found).startswith("worker bad on host-bad is set aside: 3 bundles in a row failed")
    assert "no GPU" in str(found)
    assert to_set_aside([*history, ended("bad", "3")], ("bad",), most_workers=3) is None


def test_the_last_worker_is_never_set_aside() -> None:
    history = [ended("good"), *(ended("bad", str(batch)) for batch in range(9))]
    assert to_set_aside(history, (), most_workers=1) is None
    assert to_set_aside(history, ("good",), most_workers=2) is None
    assert to_set_aside(history, ("good",), most_workers=3) is None  # nobody who is left has called anything


def test_a_worker_that_was_set_aside_and_has_gone_takes_nobodys_place() -> None:
    history = [ended("good"), *(ended(worker, f"{worker}{batch}") for worker in ("bad", "worse") for batch in range(3))]
    assert to_set_aside(history, ("bad",), most_workers=2) is None
    found = to_set_aside(history, ("bad",), gone=("bad",), most_workers=2)
    assert found is not None
    assert found.worker == "worse"
    assert to_set_aside(history, ("bad", "worse"), gone=("bad", "worse"), most_workers=2) is None


def test_an_engine_that_fails_everywhere_is_no_matter_of_workers() -> None:
    history = [ended(worker, f"{worker}{batch}") for batch in range(9) for worker in "ab"]
    assert to_set_aside(history, (), most_workers=2) is None


def test_a_batch_that_fails_everywhere_is_no_matter_of_workers() -> None:
    poison = [ended(worker, batch) for batch in "123" for worker in "ab"]
    assert to_set_aside([ended("a"), ended("b"), *poison], (), most_workers=2) is None


def test_one_batch_alone_is_no_proof() -> None:
    assert to_set_aside([ended("a"), *[ended("b", "1")] * 9], (), most_workers=2) is None


def test_a_process_that_dies_is_one_failure_whatever_its_slots() -> None:
    told = {"worker": "w", "host": "h", "process": 1, "reads": 0, "samples": 0, "time": 0.0}
    slots = [
        Beat(bundle=1, batch_id="a", **told),
        Beat(bundle=2, batch_id="", **told),
        Beat(bundle=9, batch_id="z", **told),
    ]
    found = died(slots, {1: ["a", "b"], 2: ["c", "d"]})
    assert found is not None
    assert (found.worker, found.host, found.failed) == ("w", "h", {"a", "c", "d"})
    assert died(slots[2:], {1: ["a", "b"]}) is None  # an earlier flow's


def test_what_failed_before_a_worker_committed_again_is_forgotten() -> None:
    history = [ended("a"), ended("b", "1"), ended("b", "2"), ended("b"), ended("b", "3")]
    assert to_set_aside(history, (), most_workers=2) is None


def test_slow_workers_are_those_under_half_the_median_rate() -> None:
    manifests = [
        {
            "worker": worker,
            "reads": 1,
            "samples": samples,
            "began": began,
            "ended": began + 20.0,
            "metrics": {"calling": {"wall": 8.0}, "formatting": {"wall": 2.0}, "committing": {"wall": 99.0}},
        }
        for worker, samples in (("a 1", 1000), ("b 2", 900), ("c 3", 400))
        for began in (0.0, 10.0)
    ]
    figures = figures_of(manifests)
    assert [one.seconds for one in figures] == [30.0] * 3
    assert [(one.worker, one.batches, one.samples_per_second) for one in figures] == [
        ("a 1", 2, 100.0),
        ("b 2", 2, 90.0),
        ("c 3", 2, 40.0),
    ]
    assert [one.worker for one in slow_workers(figures)] == ["c 3"]
    assert slow_workers([]) == []
