"""One shoal at a time works on a folder: two would do everything twice."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.core.errors import SettingsError

#: Locks that this process holds already: a flow asks again for what the command line holds.
_held: set[Path] = set()


@contextmanager
def alone(file: Path, *, what: Path) -> Iterator[None]:
    """Hold a lock file while the block runs.

    Args:
        file: The lock file; its folder is made if needed.
        what: What the lock is for, for the message.

    Raises:
        SettingsError: another process holds it.
    """
    file = file.absolute()
    if file in _held:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise SettingsError(
                f"another shoal works on {what} ({lock.read().strip()}); wait for it, or choose another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def held(file: Path) -> bool:
    """Tell whether a process holds a lock file, this one or another."""
    file = file.absolute()
    if file in _held:
        return True
    try:
        with file.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
