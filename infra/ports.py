"""The port that a site names for its basecall servers: one for all of them, so it is one server's at a time.

Who starts a server claims its port by a lock on a file, which the server's keeper inherits and holds to its end. Two
that start at once would else both find the port free; and a second server takes over the first one's socket unasked.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import threading
import time
from pathlib import Path

from tasks.core.dorado import fixed_port
from tasks.core.errors import EngineError

#: Seconds that a server which is ending may hold the port; Slurm gives a job that it ends half a minute.
FREE_WITHIN = 60.0
LOOK_EVERY = 0.5


def claim(port: str, *, within: float = FREE_WITHIN) -> int | None:
    """Return the descriptor of a lock on this port, as soon as nobody has it; None where the server chooses its port.

    Raises:
        EngineError: another server or program has it; says what to do.
    """
    place = fixed_port(port)
    if place is None:
        return None
    try:
        lock = os.open(_lock_of(place), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EngineError(f"dorado.port in the site, {port}, can't be used here: {error}") from error
    try:
        deadline = time.monotonic() + within
        while not _locked(lock) or _answers(place):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{port} is taken on {socket.gethostname()}, by another job's or run's server or another program; "
                    "dorado.port in the site is one for all servers: leave it out, and each takes a port that is free"
                )
            threading.Event().wait(LOOK_EVERY)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _lock_of(place: int | Path) -> Path:
    """Return the lock file: beside a socket, for jobs may have a /tmp of their own; that of a number is the user's."""
    if isinstance(place, Path):
        return place.with_name(f"{place.name}.lock")
    return Path(tempfile.gettempdir()) / f"shoal-port-{place}.{os.getuid()}.lock"


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _answers(place: int | Path) -> bool:
    """Say whether somebody listens there: a program that knows nothing of our locks."""
    numbered = isinstance(place, int)
    with socket.socket(socket.AF_INET if numbered else socket.AF_UNIX) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(("127.0.0.1", place) if numbered else str(place))
        except (BlockingIOError, TimeoutError):  # its queue is full
            return True
        except OSError:
            return False
    return True
