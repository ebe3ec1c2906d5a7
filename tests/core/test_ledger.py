from __future__ import annotations

import uuid

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.ledger import first_occurrence, id_order, prove

#: Few values, so that collisions come; some differ in one half only.
IDS = st.lists(st.sampled_from([(a << 64) + b for a in (0, 1, 2**63) for b in (0, 1, 2**64 - 1)]), max_size=30)


def packed(ids: list[int]) -> np.ndarray:
    return np.frombuffer(b"".join(uuid.UUID(int=i).bytes for i in ids), np.uint8).reshape(-1, 16)


def unpacked(ids: np.ndarray) -> list[int]:
    return [uuid.UUID(bytes=row.tobytes()).int for row in ids]


@given(IDS.map(set).map(list), IDS)
def test_prove_finds_exactly_what_is_wrong(planned: list[int], recorded: list[int]) -> None:
    proof = prove(packed(planned), packed(recorded))
    assert unpacked(proof.missing) == sorted(set(planned) - set(recorded))
    assert unpacked(proof.foreign) == sorted(set(recorded) - set(planned))
    assert unpacked(proof.doubled) == sorted({i for i in recorded if recorded.count(i) > 1})
    assert proof.holds == (sorted(planned) == sorted(recorded))


@given(IDS)
def test_first_occurrence(ids: list[int]) -> None:
    assert first_occurrence(packed(ids)).tolist() == [ids.index(i) for i in ids]


@given(IDS)
def test_id_order(ids: list[int]) -> None:
    assert unpacked(packed(ids)[id_order(packed(ids))]) == sorted(ids)
