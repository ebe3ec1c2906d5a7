"""Split under engines that misbehave, and input that does."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl
import pytest

from tasks.core.calls import EngineIdentity, Outcome
from tasks.core.errors import EngineError, InputError
from tasks.core.reads import Read
from tasks.engines.null import NullEngine
from tasks.formats.commit import committed_ids, read_manifest
from tasks.formats.pod5 import scan_pod5
from tasks.formats.workspace import Workspace
from tasks.launch import launch
from tasks.merge import merge
from tasks.settings import RunSettings
from tasks.verify import verify
from tests.making import damage_signal, damage_signal_table, read_uuid, write_pod5
from tests.test_pipeline import call, check_from_outside, digests, settings

Answers = Iterator[tuple[Read, Outcome]]


class Wrapped:
    """The null engine with a bend; `bend` makes other answers of its answers."""

    identity: EngineIdentity = NullEngine.identity

    def bend(self, answers: Answers) -> Answers:
        raise NotImplementedError

    def basecall(self, reads: Iterable[Read]) -> Answers:
        return self.bend(NullEngine().basecall(reads))

    def close(self) -> None:
        """Hold nothing."""


class Backwards(Wrapped):
    def bend(self, answers: Answers) -> Answers:
        yield from reversed(list(answers))


class Late(Wrapped):
    def bend(self, answers: Answers) -> Answers:
        found = list(answers)
        time.sleep(0.1)
        yield from found


class Broken(Wrapped):
    def bend(self, answers: Answers) -> Answers:
        for number, answer in enumerate(answers):
            if number == 8:
                raise EngineError("the GPU fell off the bus")
            yield answer


class Forgetful(Wrapped):
    def bend(self, answers: Answers) -> Answers:
        yield from list(answers)[:-1]


class Stuttering(Wrapped):
    def bend(self, answers: Answers) -> Answers:
        for answer in answers:
            yield answer
            yield answer


@pytest.fixture
def given(tmp_path: Path) -> RunSettings:
    """A run of three batches of five reads."""
    for seed in (1, 2, 3):
        write_pod5(tmp_path / "data" / f"{seed}.pod5", [20_000] * 5, seed=seed)
    return settings(tmp_path / "data", out=tmp_path / "out")


def test_answers_in_any_order_give_the_same_bytes(given: RunSettings, tmp_path: Path) -> None:
    other = given.model_copy(update={"out": tmp_path / "other"})
    for engine, one in ((NullEngine(), given), (Backwards(), other)):
        launch(one)
        call(one, engine)
        merge(one)
    assert digests(given.out) == digests(other.out)


@pytest.mark.parametrize(
    ("engine", "complaint", "committed"),
    [
        (Broken(), "fell off the bus", 0),
        (Forgetful(), "1 reads of 3 batches unanswered", 2),
        (Stuttering(), "twice", 0),
    ],
)
def test_an_engine_that_misbehaves_costs_no_read(
    given: RunSettings, engine: Wrapped, complaint: str, committed: int
) -> None:
    launch(given)
    with pytest.raises(EngineError, match=complaint):
        call(given, engine)
    workspace = Workspace(given.out)
    assert len(committed_ids(workspace)) >= committed
    assert not list(workspace.staging.iterdir())
    call(given)
    assert merge(given).called == 15
    check_from_outside(given.out, *given.input)


def test_a_full_disk_costs_no_read(tmp_path: Path) -> None:
    """The kernel refuses writes in the middle of a batch, here by a limit; with room again it goes on."""
    write_pod5(tmp_path / "data" / "1.pod5", [20_000] * 40)
    given = settings(tmp_path / "data", out=tmp_path / "out", batch_samples=200_000)
    launch(given)
    workspace = Workspace(given.out)
    seen = threading.Event()

    class Filling(Wrapped):
        def bend(self, answers: Answers) -> Answers:
            for number, answer in enumerate(answers):
                if number == 15:
                    seen.set()
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                yield answer

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="too large"):
            call(given, Filling())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen.is_set()
    assert len(committed_ids(workspace)) < 4
    assert not list(workspace.staging.iterdir())
    call(given)
    assert merge(given).called == 40
    check_from_outside(given.out, *given.input)


def test_two_attempts_at_once_commit_each_batch_once(given: RunSettings) -> None:
    """What Dask does when a worker that it took for dead wakes up."""
    launch(given)
    meet = threading.Barrier(2)

    class Meeting(Wrapped):
        def bend(self, answers: Answers) -> Answers:
            meet.wait()
            yield from answers

    attempts = [threading.Thread(target=call, args=(given, Meeting())) for _ in range(2)]
    for attempt in attempts:
        attempt.start()
    for attempt in attempts:
        attempt.join()
    workspace = Workspace(given.out)
    assert len({read_manifest(workspace, batch)["batch_id"] for batch in committed_ids(workspace)}) == 3
    assert merge(given).records == 15
    check_from_outside(given.out, *given.input)


def test_a_damaged_signal_quarantines_its_read_alone(given: RunSettings) -> None:
    victim = given.input[0] / "2.pod5"
    damage_signal(victim)
    assert len(scan_pod5(victim).read_ids) == 5
    launch(given)
    call(given)
    merged = merge(given)
    assert (merged.called, merged.quarantined) == (14, 1)
    (row,) = pl.read_parquet(given.out / "ledger.parquet").filter(fate="quarantined").to_dicts()
    assert row["reason"].startswith("unreadable_signal")
    assert row["file"] == str(victim)
    check_from_outside(given.out, *given.input)


def quarantined(given: RunSettings) -> list[str]:
    """Merge, check, and return the reasons of the reads that are quarantined."""
    merged = merge(given)
    rows = pl.read_parquet(given.out / "ledger.parquet").filter(fate="quarantined")
    assert merged.called == merged.reads - rows.height
    check_from_outside(given.out, *(path for path in given.input[0].iterdir() if path.is_file()))
    return rows["reason"].to_list()


def test_a_damaged_signal_table_quarantines_the_reads_of_its_file(given: RunSettings) -> None:
    victim = given.input[0] / "2.pod5"
    whole = victim.read_bytes()
    damage_signal_table(victim)
    assert len(scan_pod5(victim).read_ids) == 5
    launch(given)
    call(given)
    victim.write_bytes(whole)  # so that the checker can read it
    reasons = quarantined(given)
    assert len(reasons) == 5
    assert all(reason.startswith(f"corrupt: {victim}: ") for reason in reasons)


def test_a_file_that_goes_while_the_run_is_on_costs_its_own_reads(given: RunSettings) -> None:
    """Only the search in a batch that failed again and again gives it up, for it may come back."""
    launch(given)
    victim = given.input[0] / "2.pod5"
    victim.unlink()
    with pytest.raises(InputError, match=r"2\.pod5: no such file"):
        call(given)
    for number in range(3):
        call(given, only=slice(number, number + 1), carefully=True)
    assert quarantined(given) == [f"missing: {victim}: no such file"] * 5


@pytest.mark.parametrize("change", ["ids", "lengths", "run", "fewer"])
def test_a_file_that_is_replaced_while_the_run_is_on_is_not_called_for_the_planned_one(
    given: RunSettings, change: str
) -> None:
    launch(given)
    victim = given.input[0] / "2.pod5"
    whole = victim.read_bytes()
    victim.unlink()
    if change == "run":
        write_pod5(victim, [20_000] * 5, seed=2, flow_cell_id="FAX2")
    else:
        lengths = {"ids": [20_000] * 5, "lengths": [20_000] * 3 + [20_001] * 2, "fewer": [20_000] * 3}[change]
        write_pod5(victim, lengths, seed=7 if change == "ids" else 2)
    with pytest.raises(InputError, match=r"2\.pod5: .*; plan again"):
        call(given)
    for number in range(3):
        call(given, only=slice(number, number + 1), carefully=True)
    victim.write_bytes(whole)  # so that the checker looks for the reads that were planned
    reasons = quarantined(given)
    assert len(reasons) == (5 if change in ("ids", "run") else 2)
    assert all(reason.startswith(f"changed: {victim}: ") for reason in reasons)


def test_files_that_change_places_while_the_run_is_on_are_found_by_the_next_launch(given: RunSettings) -> None:
    launch(given)
    one, other = given.input[0] / "2.pod5", given.input[0] / "3.pod5"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(InputError, match="plan again"):
        call(given)
    launch(given)
    call(given)
    assert merge(given).called == 15
    check_from_outside(given.out, *given.input)


def test_a_file_system_that_is_away_costs_no_read(given: RunSettings) -> None:
    launch(given)
    folder = given.input[0]
    folder.rename(folder.with_name("away"))
    for emptied in (False, True):
        if emptied:
            folder.mkdir()  # a mount point
        with pytest.raises(InputError, match="no such file"):
            call(given, only=slice(0, 1), carefully=True)
    folder.rmdir()
    folder.with_name("away").rename(folder)
    call(given)
    assert merge(given).called == 15


def test_a_read_that_a_format_cannot_hold_quarantines_itself_alone(given: RunSettings) -> None:
    given = given.model_copy(update={"output": given.output.model_copy(update={"formats": ("fastq", "bam")})})
    victim = write_pod5(given.input[0] / "4.pod5", [20_000], seed=4, first=2**32 - 1)
    write_pod5(given.input[0] / "5.pod5", [20_000] * 3, seed=4)
    launch(given)
    call(given)
    (reason,) = quarantined(given)
    assert reason.startswith(f"unwritable: {victim}: read {read_uuid(4, 2**32 - 1)} in row 0 can't be written")
    assert not verify(Workspace(given.out)).faults


def test_a_read_of_a_hundred_million_samples(tmp_path: Path) -> None:
    write_pod5(tmp_path / "data" / "long.pod5", [5_000, 100_000_000, 5_000])
    given = settings(tmp_path / "data", out=tmp_path / "out")
    launch(given)
    call(given)
    merged = merge(given)
    assert merged.called == 3
    assert merged.bases == 8_000_800


def test_figures_of_a_bundle_add_up(given: RunSettings) -> None:
    launch(given)
    call(given)
    workspace = Workspace(given.out)
    manifests = [read_manifest(workspace, batch) for batch in committed_ids(workspace)]
    reading = [manifest["metrics"]["reading"] for manifest in manifests]
    assert sum(figures["reads"] for figures in reading) == 15
    assert sum(figures["bytes"] for figures in reading) == 2 * 15 * 20_000
    assert all(figures["wall"] >= 0 for manifest in manifests for figures in manifest["metrics"].values())


def test_a_batch_begins_when_its_reads_go_to_the_engine(given: RunSettings) -> None:
    launch(given)
    call(given, Late())
    workspace = Workspace(given.out)
    first = min((read_manifest(workspace, batch) for batch in committed_ids(workspace)), key=lambda one: one["began"])
    assert first["ended"] - first["began"] > 0.1
