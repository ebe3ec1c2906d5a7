"""A child process whose output we read, and that never outlives us."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

#: prctl's option: the signal a process gets when the thread that made it is gone (Linux).
_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own; its output comes by a pipe, its stderr goes into a log file.

    On Linux the kernel ends it when the calling thread ends, so call this in one that stays.
    """
    parent = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def tie_to_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # we died between fork and prctl
                os._exit(1)

    with log.open("ab") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=tie_to_parent,
        )


def end(process: subprocess.Popen[bytes], *, grace: float = 5.0) -> None:
    """End a program and all of its process group: ask, wait `grace` seconds, then kill who is left. Harmless twice."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # also when it obeyed: its own children may not have
    process.wait()
