"""Child processes never outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from infra.processes import began, end, is_same, spawn

#: Starts a child that sleeps, tells its process id, and waits.
PARENT = """
import os, sys, time
from pathlib import Path
from infra.processes import spawn
child = spawn(["sleep", "300"], log=Path(sys.argv[1]), environment=os.environ)
print(child.pid, flush=True)
time.sleep(300)
"""


def gone(pid: int, within: float = 60.0) -> bool:
    """Say whether a process ends (a zombie has ended) in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def spawn_python(script: str, log: Path) -> subprocess.Popen[bytes]:
    """Run a script that prints when it is ready, and wait until it is."""
    process = spawn([sys.executable, "-u", "-c", script], log=log, environment=os.environ)
    deadline = time.monotonic() + 120
    while not log.read_bytes().endswith(b"\n"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.kill()
    assert gone(child)


def test_output_is_appended_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for word in ("one", "two"):
        assert spawn(["sh", "-c", f"echo {word}; echo {word} >&2"], log=log, environment=os.environ).wait() == 0
    assert log.read_text().split() == ["one", "one", "two", "two"]


def test_the_environment_is_the_given_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spawn(["/bin/sh", "-c", "echo $SHOAL_TEST"], log=log, environment={"SHOAL_TEST": "fish"}).wait()
    assert log.read_text() == "fish\n"


def test_a_child_has_a_process_group_of_its_own(tmp_path: Path) -> None:
    process = spawn(["sleep", "300"], log=tmp_path / "log", environment=os.environ)
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    end(process)
    assert process.returncode == -signal.SIGTERM


def test_end_kills_what_does_not_listen(tmp_path: Path) -> None:
    process = spawn_python(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(300)",
        tmp_path / "log",
    )
    end(process, grace=0.2)
    assert process.returncode == -signal.SIGKILL


def test_end_is_harmless_when_it_has_ended(tmp_path: Path) -> None:
    process = spawn(["true"], log=tmp_path / "log", environment=os.environ)
    process.wait()
    end(process)
    end(process)
    assert process.returncode == 0


def test_end_leaves_nobody_of_the_group(tmp_path: Path) -> None:
    """The leader obeys, its child does not."""
    process = spawn_python(
        "import subprocess, sys, time\n"
        "deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); time.sleep(300)'\n"
        "child = subprocess.Popen([sys.executable, '-u', '-c', deaf], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid)\n"
        "time.sleep(300)\n",
        tmp_path / "log",
    )
    child = int((tmp_path / "log").read_text())
    try:
        end(process, grace=0.5)
        assert gone(child)
    finally:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)


def test_a_process_is_known_by_when_it_began(tmp_path: Path) -> None:
    """Its name tries to break the reading of stat; once it has ended, it is nobody, also as a zombie."""
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as child:
        time.sleep(0.05)
        since = began(child.pid)
        assert since is not None
        assert since == began(child.pid)
        assert is_same(child.pid, since) is True
        assert is_same(os.getpid(), since) is False
        assert is_same(child.pid, psutil.Process(child.pid).create_time()) is True
        assert is_same(child.pid, 1.0) is None
        child.kill()
        assert gone(child.pid)
        assert began(child.pid) is None
        assert is_same(child.pid, since) is False
    assert is_same(child.pid, since) is False
