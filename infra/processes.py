"""Child processes that never outlive us."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import psutil

#: prctl's option: the signal a process gets when the thread that made it is gone (Linux).
_PR_SET_PDEATHSIG = 1

#: When a process began: on Linux the boot and the kernel's ticks since, which no step of the clock moves; elsewhere,
#: and in what older versions wrote, seconds since the epoch.
Began: TypeAlias = str | float


def began(process: int) -> Began | None:
    """Return when a process began; None for one that has ended, also where its parent does not know that yet."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return _created(process)
    try:
        # Fields 3 and on of proc(5)'s stat; the second, the program's name, may hold blanks and parentheses.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else f"{boot}/{fields[19].decode()}"


def is_same(process: int, since: Began) -> bool | None:
    """Tell whether a process is the one that began then; None: one with its number lives, and it can't be told."""
    try:
        now = began(process)
    except PermissionError:  # another user's, where /proc shows only our own (hidepid)
        return None
    if now is None or isinstance(since, str):
        return now == since
    created = _created(process)
    return True if created is not None and abs(created - since) < 1.0 else None


def _created(process: int) -> float | None:
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else float(found.create_time())
    except psutil.Error:
        return None


def tied_to_parent() -> Callable[[], None]:
    """Return what a child is to do between fork and exec, so that the kernel ends it (Linux) when its parent is gone.

    The parent is the thread that makes the child: that one has to live as long as the child is wanted.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # we died between fork and prctl
                os._exit(1)

    return tie


def spawn(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own, its output going to a log file.

    On Linux the kernel ends it when we die, however we die. Ctrl-C on our terminal does not reach it: `end` does.
    """
    with log.open("ab") as output:
        return subprocess.Popen(  # the child is short of a fork-safe lock only between fork and exec
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=tied_to_parent(),
        )


def end(process: subprocess.Popen[bytes], *, grace: float = 10.0) -> None:
    """End a program and all of its process group: ask, wait `grace` seconds for the program, then kill who is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        os.killpg(process.pid, signal.SIGKILL)  # also when it obeyed: its own children may not have
    process.wait()
