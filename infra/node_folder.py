"""The folder of a machine in which those who share a basecall server meet, and how it goes when they have gone.

Each of them holds a shared lock on `users.lock` for as long as it lives, however it dies. The folder is removed by the
keeper of the server or the worker that is out last; what a killed job leaves, by whoever starts the next server there.
Only who holds that lock alone removes it, and it is renamed first: who waited for the lock finds another file there, or
none, and begins again.

Files: `users.lock`, `start.lock` (who starts or mends), `keeper.json` (who holds the server, from its start on),
`server.json` (where the server is; written when it is ready, removed when it ends).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from infra.processes import is_same
from tasks.core.errors import EngineError
from tasks.formats.workspace import read_json

USERS = "users.lock"


def node_folder(name: str) -> Path:
    """Return the folder of this machine for what has this name."""
    return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}-{name}"


def join(folder: Path) -> int:
    """Make the folder and take a share of its lock, to be closed by whoever leaves; waits for one that just ends.

    Raises:
        EngineError: the folder is somebody else's.
    """
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            found = folder.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                raise EngineError(f"{folder} belongs to somebody else; remove it, or set another TMPDIR")
            share = os.open(folder / USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # removed since we made it
            continue
        fcntl.flock(share, fcntl.LOCK_SH)
        if _is_of(folder, share):
            return share
        os.close(share)  # removed while we waited


def told_in(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what a file of the folder tells; None when it is not there, or a crash of the machine left half of it."""
    with suppress(json.JSONDecodeError):
        told: dict[str, Any] | None = read_json(folder / name)
        return told
    return None


def living(told: Mapping[str, Any] | None) -> psutil.Process | None:
    """Return the keeper that a file tells of, when it is alive; a process id alone may be another's by now."""
    if not told or told["keeper_since"] is None:
        return None
    with suppress(psutil.NoSuchProcess):
        keeper = psutil.Process(told["keeper"])
        return keeper if is_same(keeper.pid, told["keeper_since"]) else None
    return None


def keeper_of(folder: Path) -> psutil.Process | None:
    """Return the keeper of the server that was started last, when it is alive."""
    return living(told_in(folder, "keeper.json"))


def remove(folder: Path, lock: int) -> None:
    """Remove the folder. For who holds its lock alone; nothing where another has come in its place."""
    gone = folder.with_name(f"{folder.name}.{os.getpid()}")
    with suppress(OSError):
        if _is_of(folder, lock):
            folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def remove_unused(folder: Path) -> None:
    """Remove the folder if no worker is left in it, and no keeper, which would do it itself."""
    try:
        lock = os.open(folder / USERS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        with suppress(OSError):
            folder.rmdir()  # nothing is in it
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if keeper_of(folder) is None:
            remove(folder, lock)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def sweep(beside: Path) -> None:
    """Remove the folders that were left where this one lies: their workers and keepers were all killed."""
    for folder in beside.parent.glob(f"shoal-{os.getuid()}-*"):
        if folder != beside and not folder.is_symlink():
            remove_unused(folder)


def _is_of(folder: Path, lock: int) -> bool:
    """Say whether an open lock is still the folder's."""
    try:
        return os.path.samestat(os.fstat(lock), (folder / USERS).stat())
    except FileNotFoundError:
        return False
