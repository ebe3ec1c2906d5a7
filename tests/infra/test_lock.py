"""The controller's lock: refused while its holder lives, taken over when it is dead, wherever that was."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from infra import lock as module
from infra.lock import alone
from infra.processes import began
from tasks.core.errors import SettingsError
from tests.slurm import wait_for

HOLD = """
import sys, time
from pathlib import Path
from infra.lock import alone
with alone(Path(sys.argv[1]), announce=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "out" / ".shoal").mkdir(parents=True)
    return tmp_path / "out" / ".shoal" / "lock"


def said() -> list[str]:
    return []


@contextmanager
def held_elsewhere(lock: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_it_is_gone_after_the_block(lock: Path) -> None:
    for _ in range(2):
        with alone(lock, announce=pytest.fail):
            assert lock.exists()
        assert not list(lock.parent.iterdir())


def test_a_living_holder_is_named(lock: Path) -> None:
    with (
        held_elsewhere(lock) as holder,
        pytest.raises(SettingsError, match=rf"another shoal works on .*/out \(process {holder.pid} on"),
        alone(lock, announce=pytest.fail),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL])
def test_a_dead_holder_is_followed_at_once(lock: Path, number: int) -> None:
    with held_elsewhere(lock) as holder:
        holder.send_signal(number)
        holder.wait()
    told: list[str] = []
    with alone(lock, announce=told.append):
        assert told == [f"process {holder.pid} on {os.uname().nodename} held this run and is dead; taking over"]
    assert not list(lock.parent.iterdir())


def elsewhere(lock: Path, count: int) -> None:
    """Write a lock as another machine's holder does."""
    lock.write_text(json.dumps(["token", "node7/pid:[1]", os.getpid(), 0.0, f"{count:012d}"]))


def test_a_silent_holder_on_another_machine_is_dead_after_a_while(lock: Path) -> None:
    elsewhere(lock, 3)
    told: list[str] = []
    with alone(lock, announce=told.append, dead_after=0.5):
        assert "node7" in told[0]
        assert "looking" in told[0]
        assert "taking over" in told[1]


def test_a_holder_on_another_machine_that_renews_is_alive(lock: Path) -> None:
    elsewhere(lock, 3)
    renewal = threading.Timer(0.3, elsewhere, (lock, 4))
    renewal.start()
    with pytest.raises(SettingsError, match="node7"), alone(lock, announce=said().append, dead_after=60):
        pass
    renewal.join()
    assert lock.exists()


def test_another_process_with_the_number_of_the_dead_one_is_no_holder(lock: Path) -> None:
    boot, _, ticks = str(began(os.getpid())).partition("/")
    here(lock, f"{boot}/{int(ticks) - 1}")
    told: list[str] = []
    with alone(lock, announce=told.append):
        assert "taking over" in told[0]


def here(lock: Path, since: str | float, count: int = 3) -> None:
    """Write a lock as a holder on this machine does, that has our number and began then."""
    lock.write_text(json.dumps(["token", module._host(), os.getpid(), since, f"{count:012d}"]))


def test_a_step_of_the_clock_makes_nobody_dead(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = psutil.Process.create_time
    with held_elsewhere(lock) as holder:
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
        with pytest.raises(SettingsError, match=f"process {holder.pid}"), alone(lock, announce=pytest.fail):
            pass
        assert lock.exists()


def test_the_lock_of_an_older_version_is_no_dead_ones_when_the_clock_has_stepped(lock: Path) -> None:
    """It tells the time of day at which its holder began; whether that renews it is then looked at."""
    here(lock, psutil.Process().create_time())
    with pytest.raises(SettingsError, match="another shoal works"), alone(lock, announce=pytest.fail):
        pass
    here(lock, 1.0)
    renewal = threading.Timer(0.3, here, (lock, 1.0, 4))
    renewal.start()
    with pytest.raises(SettingsError, match="another shoal works"), alone(lock, announce=said().append, dead_after=5):
        pass
    renewal.join()
    told: list[str] = []
    with alone(lock, announce=told.append, dead_after=0.3):
        assert "taking over" in told[1]


@pytest.mark.parametrize("text", ["", "process 1 on node7\n", "[1, 2]"])
def test_a_lock_that_says_nothing_holds_nobody_off(lock: Path, text: str) -> None:
    lock.write_text(text)
    with alone(lock, announce=said().append, dead_after=0.3):
        pass


def test_one_of_many_gets_it(lock: Path) -> None:
    """All find the same dead holder at the same time."""
    elsewhere(lock, 3)
    got: list[str] = []
    inside = threading.Semaphore(1)
    ready = threading.Barrier(8)

    def contend() -> None:
        try:
            ready.wait()  # one that came when another of this process has it would be let in
            with alone(lock, announce=said().append, dead_after=1.0):
                assert inside.acquire(blocking=False)
                got.append("in")
                wait_for(lambda: len(got) == 8, 60)
                inside.release()
        except SettingsError:
            got.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["in", *["refused"] * 7]


@pytest.fixture
def linkless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse links as exFAT does, which we can't mount here."""

    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), source, None, target)

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("linkless")
def test_where_files_cannot_be_linked(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_EVERY", 0.1)
    elsewhere(lock, 3)
    told: list[str] = []
    with alone(lock, announce=told.append, dead_after=0.3):
        assert "taking over" in told[-1]
        wait_for(lambda: "000000000002" in lock.read_text(), 10)
    assert not list(lock.parent.iterdir())
    with held_elsewhere(lock):
        with pytest.raises(SettingsError, match="another shoal"), alone(lock, announce=pytest.fail):
            pass
        assert lock.exists()


@pytest.mark.usefixtures("linkless")
def test_one_of_many_gets_it_where_files_cannot_be_linked(lock: Path) -> None:
    test_one_of_many_gets_it(lock)


def test_a_link_whose_answer_was_lost_is_ours(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lose_the_answer(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # what NFS's client does then

    monkeypatch.setattr(os, "link", lose_the_answer)
    with alone(lock, announce=pytest.fail):
        assert lock.exists()
    assert not list(lock.parent.iterdir())


@pytest.mark.parametrize("stale", [False, True])
def test_who_was_taken_over_is_interrupted(lock: Path, monkeypatch: pytest.MonkeyPatch, *, stale: bool) -> None:
    """On NFS what it writes to its old lock may then fail."""

    def gone(*given: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(module, "RENEW_EVERY", 0.1)
    interrupted = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: interrupted.set())
    try:
        with alone(lock, announce=pytest.fail):
            wait_for(lambda: "000000000001" not in lock.read_text(), 60)
            lock.unlink()
            elsewhere(lock, 1)
            if stale:
                monkeypatch.setattr(os, "pwrite", gone)
            assert interrupted.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "node7" in lock.read_text()  # not ours to remove
