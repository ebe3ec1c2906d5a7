"""Looks at real folders: what is listed, opened, called and closed. No Prefect, no clock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tasks.formats.pod5 import find_pod5
from tasks.formats.workspace import Workspace
from tasks.launch import launch
from tasks.merge import merge
from tasks.settings import RunSettings, checked
from tasks.verify import verify
from tasks.watch import STATE, Look, covered, look, note_failure
from tasks.watch_settings import StopSettings, WatchSettings
from tests.making import write_pod5
from tests.test_pipeline import call

NOW = 2_000_000_000.0
RUN = "exp/sample/20261122_0830_1A_FAX12345_0000"


class Site:
    """A folder that a sequencer writes into, and looks at it in made-up time."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.data = folder / "data"
        self.out = folder / "calls"
        self.data.mkdir()
        self.settings = checked(
            WatchSettings,
            {"folders": [self.data], "out": self.out, "engine": {"kind": "null"}, "settled_for": 10, **settings},
        )

    def write(self, name: str, *, at: float, reads: int = 3, first: int = 0, seed: int = 1, **run: Any) -> Path:
        """Write a POD5 file, as if at a time."""
        path = self.data / name
        write_pod5(path, [5_000] * reads, first=first, seed=seed, **run)
        os.utime(path, (at, at))
        return path

    def look(self, at: float) -> Look:
        return look(self.settings, now=at)

    def call(self, settings: RunSettings) -> None:
        """Do what the flow basecall does."""
        launched = launch(settings)
        done = len(launched.plan.batches) - len(launched.left)
        call(settings, only=slice(done, None))
        merge(settings)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_run_is_called_as_it_grows_and_closed_at_its_end(site: Site) -> None:
    site.write(f"{RUN}/pod5/a_0.pod5", at=NOW)
    assert not site.look(NOW + 1).calls
    (seen,) = site.look(NOW + 11).calls
    assert seen.out == str(site.out / RUN)
    assert seen.call
    site.call(seen.call.settings)
    assert covered(seen.call.settings)
    assert not site.look(NOW + 20).calls
    site.write(f"{RUN}/pod5/a_1.pod5", at=NOW + 30, first=3)
    (site.data / RUN / "pod5" / "a_2.pod5").write_bytes(b"\x8bPOD\r\n\x1a\n and no footer yet")
    os.utime(site.data / RUN / "pod5" / "a_2.pod5", (NOW + 49, NOW + 49))
    (more,) = site.look(NOW + 50).calls
    assert more.call
    assert find_pod5(more.call.settings.input) == [site.data / RUN / "pod5" / f"a_{i}.pod5" for i in (0, 1)]
    assert more.call.key != seen.call.key
    site.call(more.call.settings)
    (site.data / RUN / "final_summary_FAX12345.txt").touch()
    (waiting,) = site.look(NOW + 51).runs
    assert (waiting.action, waiting.growing) == ("wait", 1)
    last = site.look(NOW + 100)
    assert last.problems == ((str(site.data / RUN / "pod5" / "a_2.pod5"), last.problems[0][1]),)
    (run,) = last.calls
    assert run.call
    site.call(run.call.settings)
    assert [one.action for one in site.look(NOW + 110).runs] == ["close"]
    assert [one.action for one in site.look(NOW + 120).runs] == ["closed"]


def test_nothing_is_opened_or_listed_twice(site: Site) -> None:
    for run in range(5):
        site.write(f"run{run}/a.pod5", at=NOW, seed=run + 1)
        for folder in (site.data / f"run{run}", site.data):
            os.utime(folder, (NOW, NOW))
    assert site.look(NOW + 20).opened == 5
    again = site.look(NOW + 30)
    assert (again.listed, again.opened) == (0, 0)
    assert len(again.calls) == 5
    site.write("run2/b.pod5", at=NOW, first=3)
    one = site.look(NOW + 40)
    assert (one.listed, one.opened) == (1, 1)
    index = site.out / STATE / "arrivals.sqlite"
    for spoil in (index.unlink, lambda: index.write_bytes(b"no database" * 1000)):
        spoil()
        rebuilt = site.look(NOW + 50)
        assert rebuilt.opened == 6
        assert [run.call and run.call.key for run in rebuilt.runs] == [run.call and run.call.key for run in one.runs]


def test_foreign_and_unreadable_files_are_listed_and_stop_nothing(site: Site) -> None:
    site.write("run/good.pod5", at=NOW)
    (site.data / "run" / "text.pod5").write_text("not a POD5 file at all, though it is named so")
    (site.data / "run" / "empty.pod5").touch()
    (site.data / "run" / "link.pod5").symlink_to("nowhere")
    (site.data / "run" / "notes.txt").write_text("notes")
    Path(os.fsdecode(os.fsencode(site.data / "run") + b"/\xff.pod5")).touch()
    (site.data / "loop").symlink_to(site.data)
    for path in site.data.glob("run/[et]*.pod5"):
        os.utime(path, (NOW, NOW))
    seen = site.look(NOW + 20)
    assert len(seen.calls) == 1
    assert len(seen.problems) == 4, seen.problems


def test_a_name_that_is_of_no_use_and_a_link_to_nowhere_are_told_at_every_look(site: Site, tmp_path: Path) -> None:
    (site.data / "two\nlines").mkdir()
    (site.data / "late").symlink_to(tmp_path / "away")
    os.utime(site.data, (NOW, NOW))
    for at in (20, 30):
        assert [path for path, _ in site.look(NOW + at).problems] == [
            ascii(f"{site.data}/two\nlines"),
            f"{site.data}/late",
        ]
    write_pod5(tmp_path / "away" / "a.pod5", [5_000])
    os.utime(tmp_path / "away" / "a.pod5", (NOW, NOW))
    seen = site.look(NOW + 40)
    assert [run.folder for run in seen.calls] == [f"{site.data}/late"]
    assert len(seen.problems) == 1


def test_a_run_that_was_closed_is_open_by_other_stop_rules(site: Site) -> None:
    for number in (0, 1):
        site.write(f"run/{number}.pod5", at=NOW + number, first=3 * number)
    site.settings = site.settings.model_copy(update={"stop": StopSettings(reads=3)})
    (first,) = site.look(NOW + 20).calls
    assert first.call
    site.call(first.call.settings)
    assert [site.look(NOW + at).runs[0].action for at in (30, 40)] == ["close", "closed"]
    site.settings = site.settings.model_copy(update={"stop": StopSettings(reads=6)})
    (more,) = site.look(NOW + 50).calls
    assert more.call
    assert len(find_pod5(more.call.settings.input)) == 2


@pytest.mark.parametrize("reserved", [False, True], ids=["grows", "space reserved"])
@pytest.mark.parametrize("whole", ["before the last call", "while it is called", "after the last call"])
def test_a_copy_that_stalls_is_called_once_when_it_is_whole(
    site: Site, tmp_path: Path, whole: str, reserved: bool
) -> None:
    """Growth in place leaves the time stamp of the folder as it was."""
    site.write(f"{RUN}/pod5/a_0.pod5", at=NOW)
    content = write_pod5(tmp_path / "copied.pod5", [5_000] * 3, first=3).read_bytes()
    copy = site.data / RUN / "pod5" / "a_1.pod5"
    half = content[: len(content) // 2]
    copy.write_bytes(half.ljust(len(content), b"\0") if reserved else half)
    os.utime(copy, (NOW, NOW))
    (site.data / RUN / "final_summary.txt").touch()
    for folder in (copy.parent, copy.parent.parent):
        os.utime(folder, (NOW, NOW))

    def goes_on() -> None:
        with copy.open("r+b") as file:
            file.write(content)
        os.utime(copy, (NOW + 40, NOW + 40))

    (first,) = site.look(NOW + 20).calls
    assert first.call
    if whole == "before the last call":
        goes_on()
    elif whole == "while it is called":
        goes_on()
        site.call(first.call.settings)
        assert [run.action for run in site.look(NOW + 45).runs] == ["wait"]
    else:
        site.call(first.call.settings)
        assert [run.action for run in site.look(NOW + 30).runs] == ["close"]
        assert [run.action for run in site.look(NOW + 35).runs] == ["closed"]
        goes_on()
    for run in site.look(NOW + 60).calls:
        assert run.call
        site.call(run.call.settings)
    assert {run.action for run in site.look(NOW + 70).runs} <= {"close", "closed"}
    again = site.look(NOW + 80)
    assert [run.action for run in again.runs] == ["closed"]
    assert again.opened == 0
    ledger = pl.read_parquet(site.out / RUN / "ledger.parquet")
    assert ledger["read_id"].n_unique() == ledger.height == 6
    assert not verify(Workspace(site.out / RUN)).faults


def test_two_runs_for_one_output_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / side / "run" for side in ("left", "right")]
    for seed, folder in enumerate(folders, 1):
        os.utime(write_pod5(folder / "a.pod5", [5_000], seed=seed), (NOW, NOW))
    seen = look(checked(WatchSettings, {"folders": folders, "out": tmp_path / "calls"}), now=NOW + 100)
    assert [run.action for run in seen.runs] == ["refused", "refused"]
    assert "watch them into different folders" in seen.problems[0][1]


def test_a_call_that_fails_is_tried_again_and_then_given_up(site: Site) -> None:
    site.write("run/a.pod5", at=NOW)
    keys = []
    for attempt in range(3):
        (run,) = site.look(NOW + 20 + attempt).calls
        assert run.call
        keys.append(run.call.key)
        note_failure(site.settings, run.call)
    assert len(set(keys)) == 3
    (given_up,) = site.look(NOW + 30).runs
    assert given_up.action == "refused"
    assert "given up after 3 attempts" in given_up.why
    site.write("run/b.pod5", at=NOW, first=3)
    assert len(site.look(NOW + 40).calls) == 1


def test_rules_give_runs_settings_of_their_own(tmp_path: Path) -> None:
    rules = [
        {"match": {"kit": "SQK-RNA*"}, "output": {"rna_as_dna": True}},
        {"match": {"sample": "strict"}, "output": {"min_qscore": 12}},
        {"match": {"folder": "*/run*"}, "output": {"min_qscore": 8}},
    ]
    site = Site(tmp_path, rules=rules, output={"min_qscore": 5})
    site.write("run1/a.pod5", at=NOW, sample_id="strict")
    site.write("run2/a.pod5", at=NOW, seed=2)
    site.write("other/a.pod5", at=NOW, seed=3)
    calls = {Path(run.folder).name: run.call for run in site.look(NOW + 20).calls}
    found = {name: call and call.settings.output.min_qscore for name, call in calls.items()}
    assert found == {"run1": 12, "run2": 8, "other": 5}


def test_a_rule_that_does_not_fit_is_told(tmp_path: Path) -> None:
    site = Site(tmp_path, rules=[{"engine": {"barcode_kits": ["SQK-NBD114-24"]}}])
    site.write("run/a.pod5", at=NOW)
    (run,) = site.look(NOW + 20).runs
    assert run.action == "refused"
    assert "barcode_kits" in run.why


def test_the_output_may_lie_in_the_watched_folder(tmp_path: Path) -> None:
    site = Site(tmp_path, out=tmp_path / "data" / "calls")
    site.write("run/a.pod5", at=NOW)
    (run,) = site.look(NOW + 20).calls
    assert run.call
    site.call(run.call.settings)
    assert [seen.action for seen in site.look(NOW + 30).runs] == ["wait"]
    assert Workspace(Path(run.out)).merged.exists()


def test_a_day_of_two_sequencers_ends_with_each_read_called_once(site: Site) -> None:
    """24 hours, a look every 5 minutes; the watch loses its index at noon, and one sequencer starts a second run."""
    hour = 3600.0
    runs = {
        "PA/run1": [NOW + minutes * 60 for minutes in range(20, 12 * 60, 60)],
        "PB/run1": [NOW + minutes * 60 for minutes in range(35, 20 * 60, 90)],
        "PA/run2": [NOW + 13 * hour + minutes * 60 for minutes in range(0, 9 * 60, 60)],
    }
    arrivals = sorted((at, name, number) for name, times in runs.items() for number, at in enumerate(times))
    seeds = {name: seed for seed, name in enumerate(runs, 1)}
    calls = opened = 0
    for tick in range(24 * 12 + 1):
        now = NOW + tick * 300
        while arrivals and arrivals[0][0] <= now:
            at, name, number = arrivals.pop(0)
            site.write(f"{name}/pod5/{number}.pod5", at=at, first=3 * number, seed=seeds[name], flow_cell_id=name[:2])
            if number == len(runs[name]) - 1 and name != "PB/run1":  # which ends without a final_summary
                (site.data / name / "final_summary.txt").touch()
        if tick == 144:
            (site.out / STATE / "arrivals.sqlite").unlink()
        seen = site.look(now)
        opened += seen.opened
        for run in seen.calls:
            assert run.call
            site.call(run.call.settings)
            calls += 1
    assert {run.action for run in site.look(NOW + 25 * hour).runs} == {"closed"}
    files = sum(map(len, runs.values()))
    assert calls <= files + 3
    assert opened <= 2 * files
    for name, times in runs.items():
        ledger = pl.read_parquet(site.out / name / "ledger.parquet")
        assert ledger["read_id"].n_unique() == ledger.height == 3 * len(times)
        assert set(ledger["fate"]) == {"called"}
        assert not verify(Workspace(site.out / name)).faults
