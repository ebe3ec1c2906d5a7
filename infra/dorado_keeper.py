"""The process that holds a basecall server: `python -m infra.dorado_keeper FOLDER GENERATION COMMAND …`.

Starts the server, tells where it is when it says so, passes its output on to our own (a log), and ends it with all its
children when it is told to (SIGTERM) or when no worker holds a share of the folder any more.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType

from infra.node_folder import USERS, remove
from infra.processes import began, end, tied_to_parent
from tasks.core.dorado import address_of, started_on
from tasks.formats.workspace import read_json, write_json

#: Seconds that a server has to end by itself.
GRACE = 5.0


def keep(folder: Path, generation: int, command: list[str]) -> int:
    """Hold a server until it ends or nobody needs it; return its exit status."""
    state = folder / "server.json"
    server = subprocess.Popen(  # in the main thread: the kernel ends the server when that ends
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=tied_to_parent(),
    )

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    alone: list[int] = []
    threading.Thread(target=_until_nobody, args=(folder, alone), daemon=True).start()
    ready = False
    try:
        assert server.stdout is not None
        for line in server.stdout:  # read to the end: a full pipe would stop the server
            with suppress(OSError):  # a full disk costs lines of the log, and not the server
                os.write(1, line)
            if not ready and (port := started_on(line.decode(errors="replace"))):
                ready = True
                write_json(
                    state,
                    {
                        "address": address_of(port),
                        "generation": generation,
                        "keeper": os.getpid(),
                        "keeper_since": began(os.getpid()),
                        "server": server.pid,
                    },
                )
        return server.wait()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end(server, grace=GRACE)
        if (read_json(state) or {}).get("generation") == generation:  # else it is our successor's
            state.unlink(missing_ok=True)
        for lock in alone:
            remove(folder, lock)


def _until_nobody(folder: Path, alone: list[int]) -> None:
    """Wait until no worker is left, keep new ones waiting, and make the main thread end the server.

    Args:
        alone: Takes the descriptor of the lock that we then hold alone, until we end.
    """
    with suppress(FileNotFoundError):  # the folder has gone, so nobody was left
        lock = os.open(folder / USERS, os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        alone.append(lock)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
