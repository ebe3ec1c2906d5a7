"""The command `shoal` in processes of their own, which end with the test that starts them, however that ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from tests.servers import wait_until

SHOAL = Path(sys.executable).with_name("shoal")
#: Those that no test has seen end.
_running: list[subprocess.Popen[str]] = []

T = TypeVar("T")


def started(command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command, and keep what it prints for `finished`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    _running.append(process)
    return process


def finished(process: subprocess.Popen[str], status: int = 0) -> Any:
    """Wait for a run, expect its exit status, and return what it printed."""
    output, errors = process.communicate(timeout=900)
    assert process.returncode == status, errors
    return json.loads(output) if output else errors


def while_running(true: Callable[[], T], process: subprocess.Popen[str], *, every: float = 0.05) -> T:
    """Wait until something is true while a process runs, and return it."""

    def seen() -> T:
        assert process.poll() is None, process.communicate()
        return true()

    found: T = wait_until(seen, seconds=600, every=every)
    return found


def end_left() -> list[subprocess.Popen[str]]:
    """Kill the commands that still run, with all that they have started, and return them."""
    left = [process for process in _running if process.poll() is None]
    for process in left:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(60)
        psutil.wait_procs(family, timeout=60)
    for process in _running:
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()  # nobody has read it to its end
    _running.clear()
    return left
