"""The engine `dorado` with a stand-in for the program: real processes, real POD5, and all that can go wrong."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pod5
import psutil
import pytest

from tasks.core.alignment import parse_sam_line
from tasks.core.calls import Fate, Outcome
from tasks.core.errors import EngineError, SettingsError
from tasks.core.reads import Read
from tasks.engines.base import Engine
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tasks.engines.dorado_program import (
    DoradoProgram,
    DoradoProgramEngine,
    model_argument,
    program_version,
    wanted_of,
)
from tasks.engines.staged import StagedGroup
from tasks.formats.pod5 import read_rows
from tasks.settings import EngineSettings
from tests.engines import test_contract as contract
from tests.engines.squiggles import squiggle
from tests.making import run_info, write_pod5
from tests.standins.program import install

MODEL = "dna_r10.4.1_e8.2_400bps_hac@v5.2.0"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("program"))


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def opened(program: Path, tmp_path: Path) -> Iterator[Any]:
    """Opens engines, and sees to it that nothing of them is left."""
    engines: list[DoradoProgramEngine] = []
    others = children()
    for folder in ("scratch", "logs"):
        (tmp_path / folder).mkdir()

    def open_engine(settings: dict[str, Any] | None = None, **more: Any) -> DoradoProgramEngine:
        site = {"program": str(program), "scratch": tmp_path / "scratch", "logs": tmp_path / "logs"}
        given = {key: more.pop(key) for key in list(more) if key in DoradoProgram.__dataclass_fields__}
        made = EngineSettings(kind="dorado", **(settings or {}))
        engines.append(DoradoProgramEngine(made, DoradoProgram(**{**site, **given}), **more))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()
    assert {path.suffix for path in (tmp_path / "scratch").iterdir()} <= {".lock"}
    assert children() == others


def reads(*lengths: int, **changes: Any) -> list[Read]:
    run = changes.pop("run", run_info())
    return [squiggle(length, number=i + 1, run=run, position=i, row=i, **changes) for i, length in enumerate(lengths)]


def called(answers: list[tuple[Read, Outcome]]) -> dict[str, list[tuple[bytes, bytes]]]:
    return {read.read_id: [(call.sequence, call.qstring) for call in outcome.calls] for read, outcome in answers}


def expected(given: list[Read]) -> dict[str, list[tuple[bytes, bytes]]]:
    return called(list(CpuEngine(find_model(None)).basecall(given)))


def starts(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_calls_what_the_program_calls(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "starts"))
    engine = opened({"moves": True}, group_samples=30_000)
    given = reads(5000, 12_000, 700, 10, 6000, 30_000, 99, 0, 2400)
    answers = list(engine.basecall(given))
    assert {id(read) for read, _ in answers} == {id(read) for read in given}
    assert called(answers) == expected(given)
    fates = {read.num_samples: (outcome.fate, outcome.reason) for read, outcome in answers}
    assert [fates[n] for n in (0, 10, 99)] == [(Fate.SKIPPED, "too_short")] * 3
    (first, *_) = [outcome.calls[0] for read, outcome in answers if read.num_samples == 12_000]
    assert first.moves is not None
    assert int(first.moves.sum()) == len(first.sequence)
    identity = engine.identity
    assert (identity.engine, identity.version, identity.model) == ("dorado", "1.4.0+standin", MODEL)
    assert (identity.stride, identity.gpu) == (find_model(None).stride, "Stand_In")
    assert len(starts(tmp_path / "starts")) == 3
    assert all("--emit-moves" in start for start in starts(tmp_path / "starts"))
    assert len(list((tmp_path / "logs").glob("dorado.*.log"))) == 3


@pytest.mark.parametrize(
    "promise",
    [
        contract.test_answers_each_read_once,
        contract.test_calls_are_whole,
        contract.test_no_reads,
        contract.test_threads_at_once,
        contract.test_pulls_only_as_it_has_room,
        contract.test_a_failure_of_the_source_is_passed_on,
        contract.test_a_bad_read_is_answered_and_others_go_on,
    ],
)
def test_what_every_engine_promises(promise: Callable[[Engine], None], opened: Any) -> None:
    """The contract, but for one engine a time: each group costs the start of a process."""
    promise(opened({"moves": True}, group_samples=300_000))


def test_same_bytes_whatever_the_neighbours(opened: Any) -> None:
    contract.test_same_bytes_whatever_the_neighbours(opened({"moves": True}), 4000)


def test_answers_come_while_the_program_runs(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    monkeypatch.setenv("STANDIN_AFTER", "3")
    answers = opened().basecall(reads(*[5000] * 6))
    assert all(next(answers)[1].calls for _ in range(3))
    answers.close()


def test_the_next_group_starts_before_the_last_has_ended(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "starts"))
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    pulled = 0

    def source() -> Iterator[Read]:
        nonlocal pulled
        for read in reads(*[5000] * 9):
            pulled += 1
            yield read

    engine = opened(start_within=8.0, group_samples=10_000)
    with pytest.raises(EngineError, match="printed nothing for"):
        list(engine.basecall(source()))
    assert pulled == 7  # two groups of two are called, the third is staged and its end is seen
    assert len(starts(tmp_path / "starts")) == 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("exit", r"ended with status 3; its log .* ends with:\n.*\n\[error\] CUDA out of memory"),
        ("truncate", r"ends in the middle of a record \(it ended with status 0\)"),
        ("lose", r"left out 1 reads: [0-9a-f-]{36} \(it says that it has dropped 0\); its log"),
        ("untold", r"has counted 6 calls, but 5 have come"),
        ("double", r"called read [0-9a-f-]{36} twice"),
        ("stranger", r"called 00000000-0000-0000-0000-000000000007, but read .* was not given to it"),
        ("garbage", r"printed what is no record: .*terminate called"),
        ("refuse", r"ended with status 1; .*\n\[error\] CUDA device requested but no devices found"),
    ],
)
def test_faults_fail_the_attempt_and_the_next_one_is_whole(
    fault: str, words: str, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_FAULT", fault)
    monkeypatch.setenv("STANDIN_AFTER", "2")
    monkeypatch.setenv("STANDIN_ONCE", str(tmp_path / "once"))
    engine = opened()
    given = reads(*[5000] * 6)
    with pytest.raises(EngineError, match=f"(?s){words}"):
        list(engine.basecall(given))
    assert called(list(engine.basecall(given))) == expected(given)


@pytest.mark.parametrize("fault", ["hang", "deaf"])
def test_a_silent_program_is_ended_with_its_children(fault: str, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", fault)
    engine = opened(start_within=5.0)
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"printed nothing for \d+ s, with \d+ reads \(\d+ samples staged\) to call"):
        list(engine.basecall(reads(*[5000] * 6)))
    assert time.monotonic() - began < 300


def test_reads_that_the_program_drops_by_its_rule(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "drop")
    answers = list(opened().basecall(reads(*[5000] * 4)))
    outcomes = [(outcome.fate, outcome.reason) for _, outcome in answers]
    assert sorted(outcomes) == sorted([(Fate.SKIPPED, "no_bases"), *[(Fate.CALLED, "")] * 3])


def test_split_reads(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "split")
    given = reads(*[8000] * 4)
    whole = expected(given)
    answers = list(opened().basecall(given))
    assert sorted(len(outcome.calls) for _, outcome in answers) == [1, 1, 2, 2]
    for read, outcome in answers:
        assert b"".join(call.sequence for call in outcome.calls) == whole[read.read_id][0][0]
        assert {call.parent_read_id for call in outcome.calls} == {read.read_id}
        if len(outcome.calls) == 2:
            assert [call.split_point for call in outcome.calls] == [0, 4000]
            assert read.read_id not in {call.read_id for call in outcome.calls}


def test_alignments_come_with_their_call(opened: Any, tmp_path: Path) -> None:
    reference = tmp_path / "reference.fa"
    reference.write_text(">chr1 first\nACGT\n")
    given = reads(*[5000] * 4)
    answers = list(opened(reference=reference).basecall(given))
    assert called(answers) == expected(given)  # in the direction in which the strand went through the pore
    lines = [[parse_sam_line(line) for line in outcome.calls[0].alignments or ()] for _, outcome in answers]
    assert sorted(map(len, lines)) == [1, 1, 2, 2]
    assert all(first.primary and first.reference == "chr1" for first, *_ in lines)
    assert not any(other.primary for _, *others in lines for other in others)


def test_barcodes_modified_bases_and_tails(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "starts"))
    wanted = {
        "modified_bases": "5mCG_5hmCG",
        "barcode_kits": "SQK-NBD114-24",
        "barcodes": "barcode01,barcode02",
        "poly_a": True,
    }
    engine = opened(wanted)
    given = [squiggle(5000, number=n, channel=n) for n in range(1, 4)]
    answers = {read.channel: outcome.calls[0] for read, outcome in engine.basecall(given)}
    barcodes = {channel: call.barcode.arrangement for channel, call in answers.items() if call.barcode}
    assert barcodes == {1: "barcode02", 2: "unclassified", 3: "barcode01"}
    first = answers[1]
    assert first.barcode is not None
    assert (first.barcode.kit, first.barcode.score, first.barcode.rear_end_index) == ("SQK-NBD114-24", 0.75, 31)
    assert first.poly_tail is not None
    assert first.poly_tail.length == 25
    assert first.modified is not None
    assert len(first.modified.probabilities) == first.sequence.count(b"C")
    assert engine.identity.modified_base_models == (f"{MODEL}_5mCG_5hmCG@v1",)
    command = starts(tmp_path / "starts")[-1]
    assert command[2] == "hac,5mCG_5hmCG"
    assert "--sample-sheet" in command


def test_runs_have_groups_of_their_own(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "starts"))
    one, two = reads(5000, 6000), [squiggle(7000, number=9, run=run_info(flow_cell_id="FAX2"))]
    assert len(list(opened().basecall([*one, *two]))) == 3
    assert len(starts(tmp_path / "starts")) == 2


def test_two_processes_at_once_on_a_node(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of workers: each would load its model into the same GPU."""
    monkeypatch.setenv("STANDIN_SLEEP", "2")
    most, stop, others = 0, threading.Event(), children()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.1):
            most = max(most, len(set(psutil.Process().children()) - others))

    engines = [opened(group_samples=5000) for _ in range(3)]
    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(3) as workers:
        done = workers.map(lambda engine: len(list(engine.basecall(reads(5000, 5000)))), engines)
        assert list(done) == [2, 2, 2]
    stop.set()
    watching.join()
    assert most == 2


def test_closing_ends_what_runs(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_FAULT", "hang")
    monkeypatch.setenv("STANDIN_AFTER", "3")
    engine = opened()
    answers = engine.basecall(reads(*[5000] * 6))
    next(answers)
    engine.close()
    with pytest.raises(EngineError, match="ended with signal"):
        list(answers)
    with pytest.raises(EngineError, match="closed"):
        list(engine.basecall(reads(5000)))


def test_a_whole_file_is_linked_and_a_part_is_written(tmp_path: Path) -> None:
    file = write_pod5(tmp_path / "in.pod5", [1000, 2000, 3000])
    given = [read for read in read_rows(str(file), 0, 3) if isinstance(read, Read)]
    for number, (rows, hold, names) in enumerate(
        [
            ([0, 1, 2], 10**6, ["linked-0.pod5"]),
            ([0, 1, 2], 2500, ["staged.pod5"]),
            ([0, 1], 10**6, ["staged.pod5"]),
            ([1, 2], 10**6, ["staged.pod5"]),
            ([0, 2], 10**6, ["staged.pod5"]),
        ]
    ):
        with StagedGroup(tmp_path / str(number), given[0].run, hold=hold) as group:
            for row in rows:
                group.add(given[row])
            group.close()
            assert sorted(path.name for path in group.folder.iterdir()) == names
            (path,) = group.folder.iterdir()
            back = [read for read in read_rows(str(path), 0, len(rows)) if isinstance(read, Read)]
            assert [read.run for read in back] == [given[0].run] * len(rows)
            for row, read in zip(rows, back, strict=True):
                same = ("read_id", "calibration_offset", "calibration_scale", "channel", "mux", "end_reason")
                same += ("start_sample", "read_number", "minknow_events", "pore_type")
                assert all(getattr(read, name) == getattr(given[row], name) for name in same)
                assert np.array_equal(read.signal, given[row].signal)
                assert group.reads[read.read_id].num_samples == read.num_samples
        assert not group.folder.exists()


def test_signal_beyond_the_bound_is_not_held(tmp_path: Path) -> None:
    with StagedGroup(tmp_path / "group", run_info(), hold=10_000) as group:
        for read in reads(*[4000] * 5):
            group.add(read)
        group.close()
        kept = [read.signal.base is None or read.signal.strides != (0,) for read in group.reads.values()]
        assert kept == [True, True, False, False, False]
        assert {read.num_samples for read in group.reads.values()} == {4000}
        with pod5.Reader(group.folder / "staged.pod5") as reader:
            assert reader.num_reads == 5


def test_a_read_that_pod5_cannot_hold_is_quarantined(opened: Any) -> None:
    given = [*reads(5000), squiggle(5000, number=2, read_id="not-a-uuid")]
    outcomes = {read.read_id: outcome for read, outcome in opened().basecall(given)}
    assert outcomes["not-a-uuid"].fate is Fate.QUARANTINED
    assert outcomes[str(uuid.UUID(given[0].read_id))].fate is Fate.CALLED


def test_a_model_by_name_is_a_folder(tmp_path: Path, opened: Any) -> None:
    (tmp_path / "models" / MODEL).mkdir(parents=True)
    assert model_argument("sup@v5", None) == "sup@v5"
    assert model_argument(MODEL, tmp_path / "models") == str(tmp_path / "models" / MODEL)
    assert model_argument(str(tmp_path / "models" / MODEL), None) == str(tmp_path / "models" / MODEL)
    with pytest.raises(SettingsError, match=r"engine\.model: 'hac5' is none of fast, hac, sup"):
        model_argument("hac5", tmp_path / "models")
    engine = opened({"model": MODEL, "modified_bases": "6mA"}, models=tmp_path / "models")
    assert len(list(engine.basecall(reads(5000)))) == 1
    assert engine.identity.model == MODEL


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"duplex": True}, "engine.duplex"),
        ({"barcode_kits": "A,B"}, "engine.barcode_kits: dorado takes one kit, not A, B"),
        ({"bed": __file__}, "engine.bed: needs output.reference"),
    ],
)
def test_what_the_program_cannot_do_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        wanted_of(EngineSettings(kind="dorado", **settings), DoradoProgram(), None)


@pytest.mark.parametrize(
    ("settings", "trim"),
    [
        ({}, "all"),
        ({"trim": "none"}, "none"),
        ({"barcode_kits": "A"}, "all"),
        ({"barcode_kits": "A", "barcode_trim": False}, "adapters"),
        ({"barcode_kits": "A", "barcode_trim": False, "trim": "none"}, "none"),
    ],
)
def test_trimming(settings: dict[str, Any], trim: str) -> None:
    assert wanted_of(EngineSettings(kind="dorado", **settings), DoradoProgram(), None).trim == trim


def test_version(program: Path, tmp_path: Path) -> None:
    assert program_version(str(program)) == "1.4.0+standin"
    with pytest.raises(SettingsError, match=r"dorado.program: 'no-such-program' is not there"):
        program_version("no-such-program")
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho hello\nexit 3\n")
    other.chmod(0o755)
    with pytest.raises(EngineError, match="ended with status 3 and names no version: 'hello'"):
        program_version(str(other))
