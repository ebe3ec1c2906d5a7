"""One controller per run folder: a lock that its holder renews, and that the next one takes over when it is dead.

A lock of the operating system would do on one machine; on network file systems it may be missing, local to a node, or
outlive its holder. So the lock is a file, made by a hard link, which is atomic wherever there are links, and else by
creating it where there is none. Its holder writes a count into it every few seconds, through the descriptor it made it
with, so that a lock which was taken away is never renewed by mistake. Whoever finds a lock looks whether its process
lives, where that can be seen, and else whether the count moves; no clocks are compared.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.processes import Began, began, is_same
from tasks.core.errors import SettingsError

logger = logging.getLogger(__name__)

#: Seconds between renewals, and without one until a holder that we can't see is taken for dead.
RENEW_EVERY = 5.0
DEAD_AFTER = 30.0
#: Locks that this process holds: a flow asks again for what the command line holds.
_ours: set[Path] = set()


@dataclass(frozen=True, slots=True)
class _Holder:
    """What a lock file says."""

    token: str
    host: str
    process: int
    #: When the process began: another one may have its number now.
    began: Began

    def __str__(self) -> str:
        return f"process {self.process} on {self.host.split('/')[0]}"


@contextmanager
def alone(lock: Path, *, announce: Callable[[str], None], dead_after: float = DEAD_AFTER) -> Iterator[None]:
    """Hold a lock while the block runs; wait a little where it takes that to see whether its holder is dead.

    Within a block that holds it, in the same process, this is nothing.

    Should another take the lock from us, since we were suspended for long, this process is interrupted.

    Raises:
        SettingsError: somebody who is alive holds it.
    """
    lock = lock.absolute()
    if lock in _ours:
        yield
        return
    me = _Holder(token=uuid.uuid4().hex, host=_host(), process=os.getpid(), began=began(os.getpid()) or 0.0)
    mine = lock.with_name(f".{lock.name}.{me.token}")
    with mine.open("wb", buffering=0) as file:
        file.write(_text(me, 0))
        os.fsync(file.fileno())
    try:
        descriptor = _take(lock, mine, me, announce, dead_after)
    finally:
        mine.unlink()
    stop = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lock, me, descriptor, stop), name="renew-lock", daemon=True)
    renewing.start()
    _ours.add(lock)
    try:
        yield
    finally:
        _ours.discard(lock)
        stop.set()
        renewing.join()
        _give_up(lock, me)
        os.close(descriptor)


def held(lock: Path) -> bool:
    """Tell whether somebody who is alive holds a lock, this process or another."""
    return lock.absolute() in _ours or (_read(lock) is not None and _alive(lock, logger.info, DEAD_AFTER))


def _take(lock: Path, mine: Path, me: _Holder, announce: Callable[[str], None], dead_after: float) -> int:
    """Make the lock, of the file `mine`, once there is none, or none but a dead holder's; return its descriptor.

    Several may find the same holder dead at once. Its lock is removed by whoever holds a lock on doing so, taken in the
    same way: looking and removing are two steps, between which the lock could have become another's.
    """
    while True:
        with suppress(FileExistsError):
            return _make(lock, mine, me)
        found = _read(lock)
        if found is None:
            continue  # it was given up since
        holder, _ = found
        if _alive(lock, announce, dead_after):
            raise SettingsError(
                f"another shoal works on {lock.parent.parent} ({holder}); wait for it, or choose another folder"
            )
        removal = lock.with_name(f".{lock.name.lstrip('.')}.{holder.token}")
        os.close(_take(removal, mine, me, announce, dead_after))
        try:
            if _holds(lock, holder):
                announce(f"{holder} held this run and is dead; taking over")
                lock.unlink()
        finally:
            _give_up(removal, me)


def _make(lock: Path, mine: Path, me: _Holder) -> int:
    """Make the lock where there is none; return a descriptor to renew it through.

    Raises:
        FileExistsError: it is somebody's.
    """
    try:
        os.link(mine, lock)
    except FileExistsError:
        if not _holds(lock, me):  # where it is ours, the answer to our link was lost, and NFS asked again
            raise
    except OSError:
        # No links here, as on exFAT and some SMB and FUSE mounts. Until it is written, others find a lock that says
        # nothing, and wait whether it is renewed.
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            os.write(descriptor, _text(me, 0))
            os.fsync(descriptor)
        except OSError:
            lock.unlink()
            os.close(descriptor)
            raise
        return descriptor
    return os.open(mine, os.O_WRONLY)


def _holds(lock: Path, holder: _Holder) -> bool:
    found = _read(lock)
    return found is not None and found[0] == holder


def _give_up(lock: Path, me: _Holder) -> None:
    if _holds(lock, me):
        lock.unlink(missing_ok=True)


def _alive(lock: Path, announce: Callable[[str], None], dead_after: float) -> bool:
    """Whether a lock's holder lives: at once where we can see its process, else by whether it renews."""
    first = _read(lock)
    if first is None:
        return False
    holder = first[0]
    if holder.host == _host() and (same := is_same(holder.process, holder.began)) is not None:
        return same
    announce(f"{holder} holds this run; looking for {dead_after:.0f} s whether it is alive …")
    deadline = time.monotonic() + dead_after
    pause = threading.Event()
    while time.monotonic() < deadline:
        pause.wait(min(1.0, dead_after / 10))
        now = _read(lock)
        if now != first:
            return now is not None
    return False


def _renew(lock: Path, me: _Holder, descriptor: int, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(RENEW_EVERY):
        count += 1
        try:
            os.pwrite(descriptor, _text(me, count), 0)
            os.fsync(descriptor)
        except OSError as error:  # on NFS also where another has taken the lock away, which the next look tells
            logger.warning("the lock %s can't be renewed: %s", lock, error)
        try:
            ours = _holds(lock, me)
        except OSError:  # the file system is away
            continue
        if not ours:
            logger.error("another shoal took this run over, since we gave no sign of life: stopping")
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _text(holder: _Holder, count: int) -> bytes:
    """Write a lock's text, always of the same length for one holder."""
    return json.dumps([holder.token, holder.host, holder.process, holder.began, f"{count:012d}"]).encode()


def _read(lock: Path) -> tuple[_Holder, str] | None:
    try:
        token, host, process, since, count = json.loads(lock.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # of an older version, or damaged: nobody renews it
        return _Holder(token="", host="", process=0, began=0.0), ""
    return _Holder(token=token, host=host, process=process, began=since), count


def _host() -> str:
    """Name the place in which process numbers mean something: a container may have our name, and numbers of its own."""
    try:
        place = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        place = ""
    return f"{os.uname().nodename}/{place}"
