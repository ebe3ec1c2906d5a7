"""The testbed as tests use it: Slurm's own commands."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.data import program

TESTBED = Path(__file__).parents[1] / "infra" / "slurm-testbed"
SITE = TESTBED / "site.toml"


@contextmanager
def testbed() -> Iterator[Path]:
    """Start the testbed, in a folder and on ports of its own; end it, by its process ids, with the block."""
    program("sbatch")
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:  # sockets want short paths
        state = Path(folder) / "state"
        environment = {**os.environ, "TESTBED": str(state), "TESTBED_PORT": str(free_ports(5))}
        try:
            done = subprocess.run(
                [TESTBED / "up"], env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            yield Path(done.stdout.strip().removeprefix("export SLURM_CONF="))
        finally:
            subprocess.run([TESTBED / "down"], env=environment, timeout=240, check=True)
    assert not state.exists()


def free_ports(count: int) -> int:
    """Find so many ports in a row that nobody listens on; return the first."""
    for first in range(20_000 + os.getpid() % 1000 * 10, 32_000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def slurm(*command: str) -> str:
    """Run one of Slurm's commands; return what it prints."""
    executable = shutil.which(command[0])
    assert executable is not None
    done = subprocess.run([executable, *command[1:]], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def jobs(*, state: str | None = None) -> dict[str, str]:
    """Return the names of the jobs in the queue, by id."""
    listed = slurm("squeue", "--noheader", "--format", "%A %j", *(["--states", state] if state else []))
    return {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in listed.splitlines()}


def wait_for(true: Callable[[], object], seconds: float = 300, what: str = "", *, every: float = 0.1) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what or f"not within {seconds} s"
        time.sleep(every)


def wait_for_jobs(wanted: Callable[[dict[str, str]], object], *, state: str | None = None) -> None:
    """Wait until the jobs in the queue, or those in one state, are as they are wanted."""
    wait_for(lambda: wanted(jobs(state=state)), every=0.5)
