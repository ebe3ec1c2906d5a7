from __future__ import annotations

import pytest

from tasks.core.attempts import Commits, Failure, times_failed, to_set_aside, workers_failed_on

WELL = {"w2": Commits(batches=5, last=100.0)}


def failures(*told: str) -> list[Failure]:
    """Make failures of `worker batch attempt`; each began a second after the one before."""
    made = []
    for second, text in enumerate(told):
        worker, batch, attempt = text.split()
        made.append(Failure(worker=worker, node="n7", batch_id=batch, attempt=attempt, began=float(second), error="E"))
    return made


@pytest.mark.parametrize(
    ("told", "commits", "workers", "aside"),
    [
        pytest.param(["w1 a 1", "w1 b 2", "w1 c 3"], WELL, "w1 w2", "w1", id="three batches, and others commit"),
        pytest.param(["w1 a 1", "w1 b 2"], WELL, "w1 w2", None, id="too few"),
        pytest.param(["w1 a 1", "w1 b 1", "w1 c 1", "w1 d 1"], WELL, "w1 w2", None, id="one attempt at four batches"),
        pytest.param(["w1 a 1", "w1 a 2", "w1 a 3", "w1 a 4"], WELL, "w1 w2", None, id="one batch, four attempts"),
        pytest.param(["w1 a 1", "w1 b 2", "w1 c 3", "w2 c 4"], WELL, "w1 w2", None, id="one of them failed elsewhere"),
        pytest.param(["w1 a 1", "w1 b 2", "w1 c 3"], {}, "w1 w2", None, id="nobody commits"),
        pytest.param(["w1 a 1", "w1 b 2", "w1 c 3"], WELL, "w1", None, id="the last worker"),
        pytest.param(["w1 a 1", "w1 b 2", "w1 c 3"], WELL, "w2 w3", None, id="it has gone already"),
        pytest.param(
            ["w1 a 1", "w1 b 2", "w1 c 3"],
            {**WELL, "w1": Commits(batches=900, last=1.0)},
            "w1 w2",
            None,
            id="it has committed since",
        ),
        pytest.param(
            ["w1 z 0", "w1 y 0", "w1 a 1", "w1 b 2", "w1 c 3"],
            {**WELL, "w1": Commits(batches=900, last=1.0)},
            "w1 w2",
            "w1",
            id="it was well for long",
        ),
        pytest.param(
            ["w1 a 1", "w1 b 2", "w1 c 3", "w3 d 4", "w3 e 5", "w3 f 6", "w3 g 7"],
            WELL,
            "w1 w2 w3",
            "w3",
            id="the worst first",
        ),
    ],
)
def test_who_is_set_aside(told: list[str], commits: dict[str, Commits], workers: str, aside: str | None) -> None:
    found = to_set_aside(failures(*told), commits, workers.split(), limit=3)
    assert (found and found.worker) == aside


def test_it_is_named_with_place_and_cause() -> None:
    found = to_set_aside(failures("w1 a 1", "w1 b 2", "w1 c 3"), WELL, ["w1", "w2"], limit=3)
    assert str(found) == "worker w1 on n7: 3 different batches failed on it; the last cause was: E"


def test_what_a_worker_at_fault_did_is_not_the_batches_fault() -> None:
    told = failures("w1 a 1", "w1 b 2", "w2 a 3")
    assert times_failed(told) == {"a": 2, "b": 1}
    assert times_failed(told, aside={"w1"}) == {"a": 1}
    assert workers_failed_on(told, {"a"}) == {"w1", "w2"}
