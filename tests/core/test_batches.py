from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.batches import Batch, Slice, batch_id, bundle, calling_seconds, cut, slices_of


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("samples", "files", "size", "expected"),
    [
        pytest.param([10, 10, 10], [0, 1, 2], 100, [0, 0, 0], id="small files together"),
        pytest.param([60, 60, 30], [0, 1, 2], 100, [0, 1, 1], id="whole files only"),
        pytest.param([50] * 6, [0] * 6, 100, [0, 0, 1, 1, 2, 2], id="a large file in slices"),
        pytest.param([10, 50, 50, 50, 10], [0, 1, 1, 1, 2], 100, [0, 1, 2, 2, 3], id="a large file stands alone"),
        pytest.param([1000, 1], [0, 0], 100, [0, 1], id="one read larger than a batch"),
        pytest.param([100], [0], 100, [0], id="exactly full"),
    ],
)
def test_cut(samples: list[int], files: list[int], size: int, expected: list[int]) -> None:
    assert cut(lengths(*samples), np.array(files, np.int32), size).tolist() == expected


@given(
    st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=20), min_size=1, max_size=15),
    st.integers(100, 2000),
)
def test_cut_covers_all_in_order(files: list[list[int]], size: int) -> None:
    samples = np.array([length for file in files for length in file], np.int64)
    file_of_read = np.repeat(np.arange(len(files), dtype=np.int32), [len(file) for file in files])
    batches = cut(samples, file_of_read, size)
    assert batches[0] == 0
    assert set(np.diff(batches).tolist()) <= {0, 1}
    totals = np.bincount(batches, weights=samples)
    assert (totals <= 2 * size + samples.max()).all()


def test_no_reads_no_batches() -> None:
    assert len(cut(lengths(), np.array([], np.int32), 100)) == 0


def test_batch_id_depends_on_ids_and_lengths_alone() -> None:
    ids = np.arange(32, dtype=np.uint8).reshape(2, 16)
    name = batch_id(ids, lengths(5, 6))
    assert name == batch_id(ids.copy(order="F"), lengths(5, 6))
    assert len({name, batch_id(ids, lengths(5, 7)), batch_id(ids[::-1], lengths(5, 6))}) == 3


def test_slices_are_the_fewest() -> None:
    rows = np.array([0, 1, 2, 5, 6, 0], np.uint32)
    files = np.array([0, 0, 0, 0, 0, 1], np.int32)
    assert slices_of(rows, files, ["a", "b"]) == (
        Slice(file="a", start=0, stop=3),
        Slice(file="a", start=5, stop=7),
        Slice(file="b", start=0, stop=1),
    )


def made(count: int, samples: int = 100) -> list[Batch]:
    return [Batch(number=i, batch_id=str(i), slices=(), reads=1, samples=samples) for i in range(count)]


@given(st.integers(0, 300), st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 100))
def test_bundles_hold_every_batch_once(count: int, size: int, slots: int, most: int) -> None:
    batches = made(count)
    bundles = bundle(batches, bundle_samples=size, slots=slots, max_bundles=most)
    assert [batch for one in bundles for batch in one.batches] == batches
    assert len(bundles) <= most
    assert [one.number for one in bundles] == list(range(len(bundles)))


def test_bundles_leave_no_slot_without_work() -> None:
    assert len(bundle(made(8), bundle_samples=10**9, slots=4, max_bundles=100)) >= 4


@pytest.mark.parametrize(
    ("count", "rate", "slots", "seconds"),
    [
        pytest.param(8, 50, 4, 4, id="all slots at work"),
        pytest.param(1, 50, 4, 2, id="one batch is called by one slot"),
        pytest.param(0, 50, 4, 0, id="nothing left"),
        pytest.param(8, 0, 4, 0, id="an engine whose rate nobody knows"),
    ],
)
def test_calling_seconds(count: int, rate: float, slots: int, seconds: float) -> None:
    assert calling_seconds(made(count), rate=rate, slots=slots) == seconds
