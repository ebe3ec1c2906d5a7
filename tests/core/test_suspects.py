from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.suspects import MOST, RANGE, STRIKES, Suspects, is_given_up


def attempt(suspects: Suspects, poison: set[int]) -> tuple[Suspects, bool]:
    """Call range by range until one holds poison; tell whether all went through."""
    for start, stop in suspects.ranges:
        suspects = replace(suspects, calling=start)
        if (poison - set(suspects.quarantined)) & set(range(start, stop)):
            return suspects, False
    return replace(suspects, calling=None), True


@given(st.integers(1, 400), st.data())
def test_exactly_the_poison_is_quarantined(reads: int, data: st.DataObject) -> None:
    poison = set(data.draw(st.lists(st.integers(0, reads - 1), max_size=4)))
    suspects, through, attempts = Suspects.of(reads), False, 0
    while not through:
        suspects, through = attempt(suspects.narrowed(), poison)
        attempts += 1
        assert [stop for _, stop in suspects.ranges[:-1]] == [start for start, _ in suspects.ranges[1:]]
        assert (suspects.ranges[0][0], suspects.ranges[-1][1]) == (0, reads)
    assert set(suspects.quarantined) == poison
    assert attempts <= 1 + len(poison) * (RANGE.bit_length() - 1 + STRIKES)
    assert not suspects.hopeless


def test_a_machine_that_fails_once_costs_no_read() -> None:
    suspects = replace(Suspects(ranges=((0, 1), (1, 2))), calling=1).narrowed()
    assert (suspects.quarantined, suspects.strikes) == ((), ((1, 1),))


def test_an_engine_that_fails_at_every_read_is_no_matter_of_reads() -> None:
    suspects = Suspects.of(200)
    for _ in range(1000):
        suspects, _through = attempt(suspects.narrowed(), set(range(200)))
        if suspects.hopeless:
            break
    assert suspects.hopeless
    assert len(suspects.quarantined) == MOST + 1


@pytest.mark.parametrize(
    ("reason", "missing_accepted", "last_resort", "folder_is_there", "given_up"),
    [
        pytest.param("corrupt", False, False, True, True, id="another try reads the same"),
        pytest.param("missing", False, False, True, False, id="it may come back"),
        pytest.param("missing", False, True, True, True, id="it has not come back"),
        pytest.param("missing", False, True, False, False, id="the whole file system is away"),
        pytest.param("missing", True, False, False, True, id="a person says that it is gone"),
        pytest.param("changed", False, False, True, False, id="the next launch looks for its reads"),
        pytest.param("changed", False, True, True, True, id="no launch has found its reads"),
    ],
)
def test_reads_of_a_file_are_given_up(
    reason: str, missing_accepted: bool, last_resort: bool, folder_is_there: bool, given_up: bool
) -> None:
    decided = is_given_up(
        reason, missing_accepted=missing_accepted, last_resort=last_resort, folder_is_there=folder_is_there
    )
    assert decided == given_up
