"""The plan as a property: whatever is found, in whatever order it comes, each read is planned once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.errors import SettingsError
from tasks.core.plan import Found, FoundFile, Plan, PlannedReads, extend_plan, make_plan
from tests.making import run_info

RUNS = (run_info(acquisition_id="a"), run_info(acquisition_id="b"))
#: Files of reads, each a number below 30, so that ids come twice, within a file and among files.
FILES = st.lists(st.lists(st.integers(0, 29), max_size=8), min_size=1, max_size=6)


def found(files: dict[str, list[int]], refused: str = "") -> Found:
    """Make what a scan would find: read number n has n * 10 + 50 samples and belongs to run n % 2."""
    numbers = np.array([n for file in files.values() for n in file], np.int64)
    ids = np.zeros((len(numbers), 16), np.uint8)
    ids[:, 0] = numbers
    return Found(
        runs=RUNS,
        refused=("", refused),
        files=tuple(FoundFile(path=name, size=100, reads=len(file)) for name, file in files.items()),
        read_ids=ids,
        num_samples=numbers * 10 + 50,
        run=(numbers % 2).astype(np.int16),
        file=np.repeat(np.arange(len(files), dtype=np.int32), [len(file) for file in files.values()]),
        row=np.array([i for file in files.values() for i in range(len(file))], np.uint32),
    )


def named(files: list[list[int]], first: int = 0) -> dict[str, list[int]]:
    return {f"{i}.pod5": file for i, file in enumerate(files, first)}


def check(plan: Plan, reads: PlannedReads, files: dict[str, list[int]]) -> None:
    """Each read once; each where the input has it; batches hold exactly their reads."""
    numbers = reads.read_ids[:, 0].tolist()
    assert sorted(numbers) == sorted({n for file in files.values() for n in file})
    for n, file, row in zip(numbers, reads.file.tolist(), reads.row.tolist(), strict=True):
        assert files[plan.files[file].path][row] == n
    for batch in plan.batches:
        inside = {files[s.file][row] for s in batch.slices for row in range(s.start, s.stop)}
        assert inside == {n for n, b in zip(numbers, reads.batch.tolist(), strict=True) if b == batch.number}
        assert (batch.reads, batch.samples) == (len(inside), sum(n * 10 + 50 for n in inside))
    assert len({batch.batch_id for batch in plan.batches}) == len(plan.batches)
    assert sum(run.reads for run in plan.runs) == len(numbers)


@given(FILES)
@settings(max_examples=60)
def test_every_read_is_planned_once(files: list[list[int]]) -> None:
    plan, reads = make_plan(found(named(files)), batch_samples=700)
    check(plan, reads, named(files))
    for file, name in zip(plan.files, named(files), strict=True):
        assert file.path == name
        assert file.status == (
            "ok" if not file.duplicates else "skipped" if file.duplicates == file.reads else "partly"
        )
    assert sum(file.reads - file.duplicates for file in plan.files) == len(reads.read_ids)


@given(FILES)
@settings(max_examples=30)
def test_a_refused_run_is_planned_and_not_called(files: list[list[int]]) -> None:
    plan, reads = make_plan(found(named(files), refused="RNA"), batch_samples=700)
    check(plan, reads, named(files))
    assert ((reads.batch < 0) == (reads.run == 1)).all()


@given(FILES, FILES, st.booleans())
@settings(max_examples=60)
def test_a_plan_only_grows(old: list[list[int]], new: list[list[int]], before: bool) -> None:
    first, reads = make_plan(found(named(old)), batch_samples=700)
    later = named(new, len(old))
    files = {**later, **named(old)} if before else {**named(old), **later}
    grown, more = extend_plan(first, reads, found(files), batch_samples=700, committed=())
    check(grown, more, files)
    kept = grown.batches[: len(first.batches)]
    assert [(b.number, b.batch_id, b.reads) for b in kept] == [(b.number, b.batch_id, b.reads) for b in first.batches]
    assert (more.read_ids[: len(reads.read_ids)] == reads.read_ids).all()


@given(FILES)
@settings(max_examples=30)
def test_the_same_input_gives_the_same_plan(files: list[list[int]]) -> None:
    first, reads = make_plan(found(named(files)), batch_samples=700)
    again, same = extend_plan(first, reads, found(named(files)), batch_samples=700, committed=())
    assert (again.batches, again.files, again.runs) == (first.batches, first.files, first.runs)
    assert (same.batch == reads.batch).all()


def test_reads_that_left_before_they_were_called_are_an_error() -> None:
    plan, reads = make_plan(found({"a.pod5": [1, 3], "b.pod5": [2]}), batch_samples=60)
    with pytest.raises(SettingsError, match=r"1 reads .* not in the input any more, e\.g\. of b\.pod5"):
        extend_plan(plan, reads, found({"a.pod5": [1, 3]}), batch_samples=60, committed=())


def test_reads_that_left_keep_their_place_on_request() -> None:
    plan, reads = make_plan(found({"a.pod5": [1, 3], "b.pod5": [2]}), batch_samples=60)
    later = found({"c.pod5": [5], "a.pod5": [3]})
    kept, same = extend_plan(plan, reads, later, batch_samples=60, committed=(), accept_missing=True)
    assert [kept.files[i].path for i in same.file.tolist()] == ["a.pod5", "a.pod5", "b.pod5", "c.pod5"]
    assert [b.batch_id for b in kept.batches[: len(plan.batches)]] == [b.batch_id for b in plan.batches]
    assert [(f.path, f.status, f.reason) for f in kept.files] == [
        ("c.pod5", "ok", ""),
        ("a.pod5", "partly", "missing"),
        ("b.pod5", "skipped", "missing"),
    ]


def test_reads_that_left_after_they_were_called_keep_their_place() -> None:
    plan, reads = make_plan(found({"a.pod5": [1, 3], "b.pod5": [2]}), batch_samples=60)
    committed = {batch.batch_id for batch in plan.batches}
    kept, same = extend_plan(plan, reads, found({"a.pod5": [1, 3]}), batch_samples=60, committed=committed)
    assert [kept.files[i].path for i in same.file.tolist()] == ["a.pod5", "a.pod5", "b.pod5"]
    assert kept.batches == plan.batches
