"""What watching decides, as tables."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

from tasks.core.errors import SettingsError
from tasks.core.watching import (
    NOTHING_CALLED,
    ArrivedFile,
    ArrivedRun,
    Called,
    StopRules,
    decide,
    format_duration,
    idempotency_key,
    matches,
    next_step,
    out_folder,
    parse_duration,
    run_folder,
    within,
)

NOW = 10_000.0


def file(name: str = "a", **changes: Any) -> ArrivedFile:
    values: dict[str, Any] = {
        "path": f"/data/run/pod5/{name}.pod5",
        "size": 100,
        "mtime_ns": int(9_000e9),
        "since": 9_010.0,
        "state": "finished",
        "reads": 10,
        "samples": 1000,
        "facts": (("kit", "SQK-LSK114"), ("flow_cell", "FAX1")),
    }
    return ArrivedFile(**{**values, **changes})


@pytest.mark.parametrize(
    ("size", "mtime", "seen", "step"),
    [
        (100, 9_999.0, None, "wait"),
        (100, 9_000.0, None, "open"),
        (100, 9_000.0, file(), "keep"),
        (101, 9_000.0, file(), "open"),
        (101, 9_999.0, file(), "wait"),
        (100, 9_000.0, file(state="unusable", reason="unfinished"), "keep"),
        (100, 9_000.0, file(state="unusable", reason="unreadable"), "open"),
        (100, 99_999.0, file(mtime_ns=int(99_999e9), state="growing", since=9_995.0), "wait"),
        # A file server whose clock runs ahead: what two looks saw counts.
        (100, 99_999.0, file(mtime_ns=int(99_999e9), state="growing", since=9_980.0), "open"),
    ],
)
def test_a_file_is_opened_once_and_when_it_has_settled(
    size: int, mtime: float, seen: ArrivedFile | None, step: str
) -> None:
    assert next_step(size, int(mtime * 1e9), seen, now=NOW, settled_for=15.0) == step


@pytest.mark.parametrize(
    ("path", "run", "out"),
    [
        ("exp/sample/20261122_1A_FAX/pod5/x.pod5", "exp/sample/20261122_1A_FAX", "exp/sample/20261122_1A_FAX"),
        ("exp/r/pod5_pass/barcode01/x.pod5", "exp/r", "exp/r"),
        ("exp/r/pod5_skip/x.pod5", "exp/r", "exp/r"),
        ("flat/x.pod5", "flat", "flat"),
        ("pod5/x.pod5", ".", "data"),
        ("x.pod5", ".", "data"),
    ],
)
def test_files_belong_to_runs(path: str, run: str, out: str) -> None:
    root = PurePath("/site/data")
    folder = run_folder(root / path, root)
    assert folder == root / run
    assert out_folder(folder, root, PurePath("/calls")) == PurePath("/calls", out)


def test_a_watched_folder_named_pod5_is_its_own_run() -> None:
    root = PurePath("/site/run/pod5")
    assert run_folder(root / "x.pod5", root) == root


@pytest.mark.parametrize(
    ("files", "ended", "called", "live", "action", "named", "closed"),
    [
        # Live: what is new is called at once, in one run with what is called.
        ([file(since=NOW - 60)], False, {}, True, "call", ["a"], False),
        ([file(since=NOW)], False, {"a": 100}, True, "wait", ["a"], False),
        ([file(), file("b", since=NOW)], False, {"a": 100}, True, "call", ["a", "b"], False),
        ([file(since=NOW), file("b", state="growing", since=NOW)], False, {"a": 100}, True, "wait", ["a"], False),
        # A file that was replaced is new.
        ([file(size=200, since=NOW)], False, {"a": 100}, True, "call", ["a"], False),
        # At once: only when the run is over.
        ([file(since=NOW)], False, {}, False, "wait", ["a"], False),
        ([file(since=NOW)], True, {}, False, "call", ["a"], True),
        ([file(since=NOW - 600)], False, {}, False, "call", ["a"], True),
        # final_summary is there, but a file still grows.
        ([file(), file("b", state="growing", since=NOW)], True, {"a": 100}, True, "wait", ["a"], False),
        # What can't be used goes into the ledger with the last call.
        ([file(since=NOW), file("b", state="unusable", since=NOW)], False, {"a": 100}, True, "wait", ["a"], False),
        ([file(), file("b", state="unusable")], True, {"a": 100}, True, "call", ["a", "b"], True),
        ([file(), file("b", state="unusable")], True, {"a": 100, "b": 100}, True, "close", ["a", "b"], True),
        ([file(state="unusable", since=NOW)], False, {}, True, "wait", [], False),
        ([file(state="unusable")], True, {}, True, "close", [], True),
        ([], True, {}, True, "close", [], True),
    ],
)
def test_what_is_done_about_a_run(
    files: list[ArrivedFile],
    ended: bool,
    called: dict[str, int],
    live: bool,
    action: str,
    named: list[str],
    closed: bool,
) -> None:
    run = ArrivedRun(folder="/data/run", files=tuple(files), ended=ended)
    done = Called(sizes={file(name).path: size for name, size in called.items()})
    decision = decide(run, done, stop=StopRules(), live=live, idle_after=600.0, now=NOW)
    assert decision.action == action, decision.why
    assert [PurePath(one.path).stem for one in decision.files] == named
    assert decision.closed == closed


def arriving(count: int) -> list[ArrivedFile]:
    return [file(f"{i}", mtime_ns=int((9_000 + 100 * i) * 1e9)) for i in range(count)]


@pytest.mark.parametrize(
    ("rules", "called", "let", "stopped"),
    [
        (StopRules(), NOTHING_CALLED, 5, ""),
        (StopRules(reads=25), NOTHING_CALLED, 3, "25 reads"),
        (StopRules(reads=30), NOTHING_CALLED, 3, "30 reads"),
        (StopRules(reads=51), NOTHING_CALLED, 5, ""),
        (StopRules(seconds=250), NOTHING_CALLED, 3, "4.167 min"),
        (StopRules(seconds=5000), NOTHING_CALLED, 5, ""),
        (StopRules(bases=1000), Called(sizes={}, bases=999), 5, ""),
        (StopRules(bases=1000), Called(sizes={one.path: 100 for one in arriving(2)}, bases=1000), 2, "1,000 bases"),
        (StopRules(seconds=250, reads=15), NOTHING_CALLED, 2, "15 reads"),
    ],
)
def test_stop_rules(rules: StopRules, called: Called, let: int, stopped: str) -> None:
    files, why = within(arriving(5)[::-1], called, rules, now=NOW)
    assert list(files) == arriving(5)[:let]
    assert why.startswith(stopped)
    assert bool(why) == bool(stopped)


def test_the_key_is_of_the_input() -> None:
    key = idempotency_key("/out", arriving(3), "digest")
    assert key == idempotency_key("/out", arriving(3)[::-1], "digest")
    others = [
        idempotency_key("/out", arriving(4), "digest"),
        idempotency_key("/other", arriving(3), "digest"),
        idempotency_key("/out", arriving(3), "other"),
        idempotency_key("/out", [*arriving(2), file("2", size=7)], "digest"),
        idempotency_key("/out", arriving(3), "digest", attempt=1),
    ]
    assert len({key, *others}) == 6


@pytest.mark.parametrize(
    ("patterns", "holds"),
    [
        ({}, True),
        ({"kit": "sqk-lsk*"}, True),
        ({"kit": "SQK-RNA*"}, False),
        ({"flow_cell": "FAX?", "folder": "*/run"}, True),
        ({"flow_cell": "FAX?", "sample": "x"}, False),
    ],
)
def test_rules_match(patterns: dict[str, str], holds: bool) -> None:
    run = ArrivedRun(folder="/data/run", files=(file(),), ended=False)
    assert matches(patterns, run.facts) == holds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30s", 30), ("5m", 300), ("1.5h", 5400), ("2 d", 172_800), (" 5m ", 300)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5 weeks", "-3m", "0", "1e9"])
def test_no_durations(text: str) -> None:
    with pytest.raises(SettingsError, match="no length of time"):
        parse_duration(text)


def test_a_duration_may_be_zero_where_that_is_allowed() -> None:
    assert parse_duration("0s", zero=True) == 0
    with pytest.raises(SettingsError, match="no length of time"):
        parse_duration("s", zero=True)


@pytest.mark.parametrize(("seconds", "text"), [(30, "30 s"), (300, "5 min"), (5400, "1.5 h"), (172_800, "2 d")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
