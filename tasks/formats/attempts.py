"""Notes of attempts: a small file for each batch that an attempt is at, taken away when it is committed.

What is left when an attempt is over is a failure, also where the worker died without a word and Dask ran the bundle
again without telling anybody.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

from tasks.core.attempts import Failure, SetAside
from tasks.formats.workspace import Workspace, read_json, write_json


class AttemptNotes:
    """The notes of one bundle's run on one worker; a failure, each of them, unless it is taken back."""

    def __init__(self, workspace: Workspace, *, worker: str = "", address: str = "") -> None:
        self.worker = worker
        self._folder = workspace.attempts
        self._address = address
        self._attempt = uuid.uuid4().hex[:12]
        self._noted: dict[str, Failure] = {}

    def begin(self, batch_id: str) -> None:
        """Note that reads of a batch go to the engine."""
        self._noted[batch_id] = Failure(
            batch_id=batch_id,
            attempt=self._attempt,
            worker=self.worker,
            node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            address=self._address,
            began=time.time(),
        )
        self._folder.mkdir(exist_ok=True)
        self._write(self._noted[batch_id])

    def end(self, batch_id: str) -> None:
        """Take a batch's note back: it is committed."""
        if self._noted.pop(batch_id, None):
            self._file(batch_id).unlink(missing_ok=True)

    def take_back(self) -> None:
        """Take all notes back: what went wrong is no matter of batches or workers."""
        for batch_id in list(self._noted):
            self.end(batch_id)

    def fail(self, error: Exception) -> None:
        """Say in all notes that are left what went wrong."""
        for failure in self._noted.values():
            self._write(replace(failure, error=f"{type(error).__name__}: {error}"))

    def _write(self, failure: Failure) -> None:
        write_json(self._file(failure.batch_id), asdict(failure), durable=False)

    def _file(self, batch_id: str) -> Path:
        return self._folder / f"{batch_id}.{self._attempt}.json"


def read_failures(workspace: Workspace, *, at_it: Callable[[str], bool] = lambda address: False) -> list[Failure]:
    """Read the notes of attempts that are over.

    Args:
        at_it: Tells, of the address of a worker process, whether it may still be at work.
    """
    noted = (read_json(file) for file in sorted(workspace.attempts.glob("[!.]*.json")))
    failures = [Failure(**told) for told in noted if told is not None]  # None: gone since it was listed
    return [failure for failure in failures if failure.error or not at_it(failure.address)]


def clear_failures(workspace: Workspace) -> None:
    """Forget what an earlier flow met with; it may have been stopped, and was another cluster's."""
    shutil.rmtree(workspace.attempts, ignore_errors=True)
    workspace.aside.unlink(missing_ok=True)


def write_aside(workspace: Workspace, aside: Iterable[SetAside]) -> None:
    """Keep which workers were set aside, for the result."""
    write_json(workspace.aside, [asdict(one) for one in aside])


def read_aside(workspace: Workspace) -> tuple[SetAside, ...]:
    """Return the workers that the flow has set aside."""
    return tuple(SetAside(**told) for told in read_json(workspace.aside) or ())
