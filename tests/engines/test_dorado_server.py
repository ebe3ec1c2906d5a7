"""The basecall server's engine, against a stand-in server in a process of its own, and the real library without one."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.core.calls import Fate, Outcome
from tasks.core.dorado import Patience
from tasks.core.errors import EngineError, SettingsError
from tasks.core.reads import Read
from tasks.engines.catalogue import find_model
from tasks.engines.cpu import CpuEngine
from tasks.engines.dorado_server import AttachedServer, DoradoServerEngine, Served, ask_server, client_library
from tasks.settings import EngineSettings
from tests import standins
from tests.data import library
from tests.engines.squiggles import squiggle
from tests.making import run_info

#: Seconds that a busy machine keeps; and what a test of a hung server, or of lost reads, waits for.
PATIENCE = Patience(base=8.0, slowest=10_000_000, stall=60.0, attempts=3)
IMPATIENCE = replace(PATIENCE, stall=8.0)


class Holder:
    """Holds a stand-in server, and starts it again when it is dead or stalled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "s"
        self.generation = 0
        self.lock = threading.Lock()
        self.start()

    def start(self) -> None:
        self.generation += 1
        self.process = subprocess.Popen(
            [sys.executable, standins.SERVER, "--port", str(self.socket)],
            env=standins.environment(self.folder),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert any("Starting server" in line for line in self.process.stdout)

    def serve(self) -> Served:
        return Served(f"ipc://{self.socket}", self.generation)

    def mend(self, seen: Served, *, stalled: bool) -> Served:
        with self.lock:
            if seen.generation == self.generation and (stalled or self.process.poll() is not None):
                self.end()
                self.start()
            return self.serve()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def standin(request: pytest.FixtureRequest) -> Iterator[None]:
    if "real" in request.node.name:
        yield
    else:
        with standins.imported():
            yield


@contextmanager
def opened(
    folder: Path,
    *,
    patience: Patience = PATIENCE,
    settings: dict[str, Any] | None = None,
    window: int | None = None,
    **faults: Any,
) -> Iterator[tuple[DoradoServerEngine, Holder]]:
    """Open an engine on a server of its own.

    Args:
        window: Samples in flight, if other than usual; unlike people, tests may choose few, which are called quickly.
    """
    holder = Holder(standins.control(folder, **faults))
    try:
        given = EngineSettings.model_validate(
            {"kind": "dorado-server", "model": standins.MODEL, **(settings or {})}
        ).model_copy(update={"in_flight_samples": window} if window else None)
        engine = DoradoServerEngine(given, holder, patience=patience)
        try:
            yield engine, holder
        finally:
            engine.close()
    finally:
        holder.end()


def given(number: int = 30, *, first: int = 1) -> list[Read]:
    return [squiggle(2000 + 100 * (i % 7), number=i) for i in range(first, first + number)]


def called_by_cpu(reads: list[Read]) -> dict[int, Outcome]:
    return {id(read): outcome for read, outcome in CpuEngine(find_model(None)).basecall(reads)}


def check(reads: list[Read], answers: list[tuple[Read, Outcome]]) -> None:
    """Each read once, and with the bases that the embedded engine calls."""
    assert Counter(id(read) for read, _ in answers) == Counter(id(read) for read in reads)
    expected = called_by_cpu(reads)
    for read, outcome in answers:
        assert [c.sequence for c in outcome.calls] == [c.sequence for c in expected[id(read)].calls], outcome


def test_same_bases_as_the_embedded_engine(tmp_path: Path) -> None:
    reads = given()
    with opened(tmp_path) as (engine, _):
        assert engine.identity.version == "7.13.6+standin"
        assert (engine.identity.model, engine.identity.stride, engine.identity.gpu) == (
            standins.MODEL,
            6,
            "Stand_In_100",
        )
        check(reads, list(engine.basecall(reads)))
        check(reads, list(engine.basecall(reads)))  # on the connection that is open already
        assert list(engine.basecall([])) == []


@pytest.mark.parametrize(
    "faults",
    [
        {"hold": 1000},
        {"hold": 7, "shuffle": True},
        {"duplicate_every": 4},
        {"unknown_every": 4},
        {"none_for": 0.9},
        {"lose_every": 9},
        {"die_after": 11},
        {"hang_after": 11},
        {"stop_after": 11},
        {"drop_after": 11},
    ],
    ids=str,
)
def test_every_read_is_answered_whatever_goes_wrong(tmp_path: Path, faults: dict[str, Any]) -> None:
    """All at once, out of order, twice, unasked, none for a while, one lost, and the server dead, hung or stopped.

    A buttery-eel client hangs for ever when a batch comes back whole in one poll, or one read never does.
    """
    reads = given()
    waited_for = {"hang_after", "stop_after", "lose_every"} & set(faults)
    with opened(tmp_path, patience=IMPATIENCE if waited_for else PATIENCE, **faults) as (engine, holder):
        check(reads, list(engine.basecall(reads)))
        restarted = holder.generation - 1
    assert restarted == (1 if {"die_after", "hang_after", "stop_after"} & set(faults) else 0)


def test_one_read_alone_comes_back(tmp_path: Path) -> None:
    reads = given(1)
    with opened(tmp_path, hold=1000) as (engine, _):
        check(reads, list(engine.basecall(reads)))


def test_reads_of_one_id_are_told_apart(tmp_path: Path) -> None:
    """In flight together, and one after the other has come back: the tag is the key, not the id."""
    reads = [replace(read, read_id=given(1)[0].read_id) for read in given(6)]
    with opened(tmp_path) as (engine, _):
        check(reads, list(engine.basecall(reads)))
        check(reads, list(engine.basecall(reads)))


@pytest.mark.parametrize("place", [3, -1])
def test_a_read_that_never_comes_is_quarantined(tmp_path: Path, place: int) -> None:
    """Whether others overtake it, or it is the last one."""
    reads = given(40)
    lost = reads[place].read_id
    with opened(tmp_path, lose_always=[lost], patience=replace(IMPATIENCE, base=0.1)) as (engine, _):
        outcomes = {read.read_id: outcome for read, outcome in engine.basecall(reads)}
    assert len(outcomes) == len(reads)
    assert outcomes[lost].fate is Fate.QUARANTINED
    assert "unanswered: submitted 3 times" in outcomes[lost].reason
    assert all(o.fate is Fate.CALLED for read_id, o in outcomes.items() if read_id != lost)


def test_splits(tmp_path: Path) -> None:
    reads = given(20)
    with opened(tmp_path, split_every=4) as (engine, _):
        outcomes = [(read, outcome) for read, outcome in engine.basecall(reads)]
    expected = called_by_cpu(reads)
    assert len(outcomes) == 20
    assert sum(len(outcome.calls) for _, outcome in outcomes) == 25
    for read, outcome in outcomes:
        assert b"".join(c.sequence for c in outcome.calls) == expected[id(read)].calls[0].sequence
        assert sum(c.num_samples for c in outcome.calls) == read.num_samples
        assert {c.parent_read_id for c in outcome.calls} == {read.read_id}
        assert all(c.split == (len(outcome.calls) > 1) for c in outcome.calls)


def test_empty_answers(tmp_path: Path) -> None:
    reads = [squiggle(length, number=length + 1) for length in (0, 1, 50, 99, 3000)]
    with opened(tmp_path) as (engine, _):
        outcomes = {read.num_samples: outcome for read, outcome in engine.basecall(reads)}
    assert all(outcomes[length] == Outcome.skipped("too_short") for length in (0, 1, 50, 99))
    assert outcomes[3000].fate is Fate.CALLED


def test_an_unfit_read_is_quarantined_and_others_go_on(tmp_path: Path) -> None:
    reads = given(3)
    reads[1] = replace(reads[1], calibration_scale=float("nan"))
    with opened(tmp_path) as (engine, _):
        outcomes = {read.read_id: outcome for read, outcome in engine.basecall(reads)}
    assert outcomes[reads[1].read_id].reason == "unfit: calibration scale is nan"
    assert outcomes[reads[0].read_id].calls
    assert outcomes[reads[2].read_id].calls


def test_a_read_that_the_library_refuses_is_quarantined_and_others_go_on(tmp_path: Path) -> None:
    """It came in a group with others, which are then passed one by one."""
    reads = given(8)
    reads[2] = replace(reads[2], start_sample=2**70)
    with opened(tmp_path) as (engine, _):
        outcomes = [(read, outcome) for read, outcome in engine.basecall(reads)]
    assert len(outcomes) == 8
    assert [o.fate for r, o in outcomes if r is reads[2]] == [Fate.QUARANTINED]
    assert sum(o.fate is Fate.CALLED for _, o in outcomes) == 7


def test_what_is_in_flight_is_bounded_in_samples(tmp_path: Path) -> None:
    pulled = 0

    def endless() -> Iterator[Read]:
        nonlocal pulled
        for number in count(1):
            pulled += 1
            yield squiggle(2000, number=number)

    with opened(tmp_path, window=100_000) as (engine, _):
        answers = engine.basecall(endless())
        assert pulled == 0
        for answered in range(1, 60):
            next(answers)
            assert pulled - answered <= 51
        answers.close()  # type: ignore[attr-defined]


def test_a_read_larger_than_the_window_goes_alone(tmp_path: Path) -> None:
    reads = [squiggle(3000, number=1), squiggle(120_000, number=2), squiggle(3000, number=3)]
    with opened(tmp_path, window=100_000) as (engine, _):
        check(reads, list(engine.basecall(reads)))


def test_a_slow_server_is_not_restarted(tmp_path: Path) -> None:
    reads = given(30)
    with opened(tmp_path, delay=0.1, patience=replace(IMPATIENCE, base=0.3)) as (engine, holder):
        answers = list(engine.basecall(reads))
        assert holder.generation == 1
    assert len(answers) == 30


def test_a_slow_consumer_is_not_a_stall(tmp_path: Path) -> None:
    reads = given(10)
    with opened(tmp_path, patience=replace(PATIENCE, stall=4)) as (engine, holder):
        answers = []
        for answer in engine.basecall(reads):
            answers.append(answer)
            if len(answers) == 1:
                time.sleep(5.5)
        assert holder.generation == 1
    check(reads, answers)


def test_a_server_that_dies_again_and_again_fails_the_bundle(tmp_path: Path) -> None:
    class Dying(Holder):
        def mend(self, seen: Served, *, stalled: bool) -> Served:
            (self.folder / "done-die_after").unlink(missing_ok=True)
            return super().mend(seen, stalled=stalled)

    holder = Dying(standins.control(tmp_path, die_after=2))
    settings = EngineSettings(kind="dorado-server", model=standins.MODEL)
    try:
        engine = DoradoServerEngine(settings, holder, patience=PATIENCE)
        with pytest.raises(EngineError, match=r"lost 4 times in one bundle, now with \d+ reads in flight"):
            list(engine.basecall(given()))
        engine.close()
    finally:
        holder.end()


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"version": "7.11.2+abc", "protocol": "23.0.0"}, r"7\.13\.6.*7\.11\.2.*pip install '\S+==7\.11\.2'"),
        ({"version": "8.0.0", "protocol": "30.0.0"}, r"8\.0\.0"),
        ({"refuse": "basecall_config_unavailable"}, r"engine\.model"),
        ({"refuse": "barcode_kit_unavailable"}, r"engine\.barcode_kits"),
        ({"refuse": "timed_out"}, "can't be reached, after 3 attempts"),
        ({"refuse_connections": True}, "can't be reached, after 3 attempts"),
    ],
)
def test_a_server_that_refuses(tmp_path: Path, faults: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words), opened(tmp_path, **faults):
        pass


@pytest.mark.parametrize(("refused", "restarted"), [(1, 0), (2, 1)])
def test_refused_in_mid_run(tmp_path: Path, refused: int, restarted: int) -> None:
    """After one was lost, connections are refused: tried again until they are not, and then with a fresh server."""
    reads = given()
    with opened(tmp_path, drop_after=5, refuse_next=refused) as (engine, holder):
        check(reads, list(engine.basecall(reads)))
        assert holder.generation - 1 == restarted
    assert len(list(tmp_path.glob("done-refuse_next-*"))) == refused


def test_slots_have_connections_of_their_own(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    parts = [given(15, first=100 * i) for i in range(1, 4)]
    with opened(tmp_path) as (engine, _), ThreadPoolExecutor(3) as slots:
        for reads, answers in zip(parts, slots.map(lambda reads: list(engine.basecall(reads)), parts), strict=True):
            check(reads, answers)


def test_a_failure_of_the_source_is_passed_on_and_the_connection_is_not_kept(tmp_path: Path) -> None:
    def broken() -> Iterator[Read]:
        yield from given(5)
        raise OSError("disk gone")

    with opened(tmp_path) as (engine, _):
        with pytest.raises(OSError, match="disk gone"):
            list(engine.basecall(broken()))
        check(given(0), list(engine.basecall([])))
        reads = given(5)
        check(reads, list(engine.basecall(reads)))


def test_duplex_is_flushed_and_the_fakes_are_dropped(tmp_path: Path) -> None:
    reads = given(5)
    with opened(tmp_path, settings={"duplex": True}) as (engine, _):
        check(reads, list(engine.basecall(reads)))
        check(reads, list(engine.basecall(reads)))


def test_a_model_is_needed() -> None:
    with pytest.raises(SettingsError, match=r"engine\.model: dorado-server needs one"):
        DoradoServerEngine(EngineSettings(kind="dorado-server"), AttachedServer("127.0.0.1:1"))


def test_shoal_works_without_the_library(tmp_path: Path) -> None:
    """Imported, but not opened: then the error says what to install."""
    (tmp_path / "pybasecall_client_lib").mkdir()
    (tmp_path / "pybasecall_client_lib" / "__init__.py").write_text("raise ImportError('not here')")
    script = (
        "from tasks.engines.dorado_server import client_library\n"
        "from tasks.core.errors import EngineError\n"
        "try: client_library()\n"
        "except EngineError as error: print(error)\n"
    )
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install 'shoal[ont]'" in done.stdout


def test_only_the_engine_imports_the_library() -> None:
    root = Path(__file__).parents[2]
    importers = [
        path.relative_to(root).as_posix()
        for folder in ("tasks", "infra", "flows", "deployments")
        for path in (root / folder).rglob("*.py")
        if re.search(r"(from|import) +pybasecall_client_lib", path.read_text("utf-8"))
    ]
    assert importers == ["tasks/engines/dorado_server.py"]


# The real library.


def members(of: Any, kind: str) -> dict[str, int]:
    found = getattr(of, kind).__members__
    return {name: int(value) for name, value in found.items()}


def documented_parameters(method: Any) -> list[str]:
    """Read the parameters of a method: off its signature, or off the docstring that pybind11 writes."""
    try:
        return [name for name in inspect.signature(method).parameters if name != "self"]
    except ValueError:
        first = (method.__doc__ or "").splitlines()[0]
        inside = first[first.index("(") + 1 : first.rindex(") ->")]
        return [part.partition(":")[0].strip() for part in inside.split(", ") if part and not part.startswith("self")]


def test_the_stand_in_is_as_the_real_library() -> None:
    real = library("pybasecall_client_lib.client_lib").BasecallClient
    with standins.imported():
        made = client_library()
        assert made is not real
        names = {name for name in dir(real) if not name.startswith("_")}
        assert {name for name in dir(made) if not name.startswith("_")} == names
        for kind in ("result", "pass_read_result", "status", "read_priority"):
            assert members(made, kind) == members(real, kind)
        for name in sorted(names):
            if callable(getattr(real, name)) and not isinstance(getattr(real, name), type):
                theirs, ours = documented_parameters(getattr(real, name)), documented_parameters(getattr(made, name))
                assert len(theirs) == len(ours), name
                for their, our in zip(theirs, ours, strict=True):
                    assert their == our or re.fullmatch(r"arg\d+", their), name
        assert tuple(made.get_software_version()) == tuple(real.get_software_version())
        assert tuple(made.get_protocol_version()) == tuple(real.get_protocol_version())
        from tasks.core.dorado import VERDICTS

        assert set(VERDICTS) == {m for kind in ("result", "pass_read_result", "status") for m in members(real, kind)}


def within(seconds: float, act: Callable[[], Any]) -> Any:
    began = time.monotonic()
    try:
        return act()
    finally:
        assert time.monotonic() - began < seconds


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ipc:///tmp/nobody-listens-here"])
def test_real_library_nobody_there(address: str) -> None:
    library("pybasecall_client_lib.client_lib")
    settings = EngineSettings(kind="dorado-server", model=standins.MODEL)
    server = AttachedServer(address, pause=0.1)
    with pytest.raises(EngineError, match="can't be reached, after 2 attempts"):
        within(120, lambda: DoradoServerEngine(settings, server, patience=replace(PATIENCE, attempts=2)))
    with pytest.raises(ConnectionError, match="timed_out"):
        within(60, lambda: ask_server(address, milliseconds=500))


def test_real_library_takes_all_our_parameters() -> None:
    from tasks.core.dorado import client_parameters

    real = library("pybasecall_client_lib.client_lib").BasecallClient
    client = real("127.0.0.1:9", "config", 1)
    made = client_parameters(
        name="a",
        moves=True,
        mods=True,
        trim="all",
        barcode_kits=("A", "B"),
        barcodes=("barcode01",),
        barcode_both_ends=True,
        barcode_trim=True,
        poly_a=True,
        poly_a_config="/p",
        reference="/r",
        bed="/b",
        duplex=True,
    )
    for name, value in {"priority": real.medium_priority, **made}.items():
        assert client.set_params({name: value}).name == "success", name
    assert client.set_params({"nonsense": 1}).name == "failed"


def test_real_library_and_bad_reads() -> None:
    from tasks.core.dorado import packaged

    real = library("pybasecall_client_lib.client_lib").BasecallClient
    client = real("127.0.0.1:9", "config", 1)
    good = packaged(squiggle(500, run=run_info()), 1)
    assert client.pass_read(good).name == "not_accepting_reads"
    for key, value in (("read_tag", 2**32), ("raw_data", [1, 2]), ("daq_scaling", 1), ("daq_offset", 1)):
        assert client.pass_read({**good, key: value}).name == "bad_read", key
    assert client.pass_read({**good, "raw_data": np.zeros(5, np.float32)}).name == "bad_read"
    assert client.get_completed_reads() == []
