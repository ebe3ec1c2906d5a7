"""What lives in a worker: the engine, opened once, and the heartbeat."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from glob import escape as glob_escape
from pathlib import Path
from typing import Any, cast

import distributed
from distributed.core import Status

from tasks.core.errors import EngineError, InputError, ShoalError
from tasks.core.liveness import Beat
from tasks.engines.base import Engine
from tasks.formats.workspace import read_json, write_json

logger = logging.getLogger(__name__)

PLUGIN = "shoal-engine"
#: Seconds between heartbeats of a slot.
BEAT_EVERY = 1.0
#: Seconds that a worker which leaves keeps results that the flow has not fetched yet.
RESULTS_WITHIN = 10


class RetirePlugin(distributed.WorkerPlugin):
    """Takes a worker out before its allocation ends: it finishes what it does, begins nothing new, and leaves.

    Dask's own `--lifetime` closes a worker within 30 s, which would cut a bundle of minutes.
    """

    name = "shoal-retire"

    def __init__(self, variable: str) -> None:
        self._variable = variable
        self._waiting: asyncio.Future[None] | None = None

    def setup(self, worker: Any) -> None:
        """Begin to wait for the time that the environment of the job names, in seconds since the epoch."""
        if at := os.environ.get(self._variable):
            self._waiting = asyncio.ensure_future(self._retire(worker, float(at)))

    def teardown(self, worker: Any) -> None:
        """Wait no more."""
        if self._waiting is not None and worker.status == Status.running:
            self._waiting.cancel()

    async def _retire(self, worker: Any, at: float) -> None:
        await asyncio.sleep(max(0.0, at - time.time()))
        for _ in range(RESULTS_WITHIN):
            worker.status = Status.closing_gracefully  # the scheduler gives it nothing more
            while worker.state.executing_count:
                await asyncio.sleep(0.2)
            logger.info("the allocation ends soon: this worker leaves")
            left = await worker.scheduler.retire_workers(
                workers=[worker.address], close_workers=False, remove=True, stimulus_id=f"{self.name}-{worker.name}"
            )
            if left:
                break
            await asyncio.sleep(1.0)  # nobody else is there to take a result that the flow has not fetched yet
        await worker.close(nanny=True, reason=self.name)


class LogPlugin(distributed.WorkerPlugin):
    """Writes what our own code logs in a worker to a file of that worker's."""

    name = "shoal-log"

    def __init__(self, folder: Path, level: str) -> None:
        self._folder = folder
        self._level = level

    def setup(self, worker: Any) -> None:
        """Open the file. A nanny's next worker is another process, and gets another file."""
        handler = logging.FileHandler(self._folder / f"{socket.gethostname()}.{os.getpid()}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s"))
        for name in ("tasks", "infra", "flows"):
            ours = logging.getLogger(name)
            ours.addHandler(handler)
            ours.setLevel(self._level)


class EnginePlugin(distributed.WorkerPlugin):
    """Holds a worker's engine for as long as the worker lives; a restarted worker gets one again.

    The engine opens in a thread of its own, and tasks wait for it. A worker gives no sign of life to the scheduler
    while `setup` runs: one that opened its engine there, for longer than worker-ttl, would be restarted for ever.
    """

    name = PLUGIN

    def __init__(self, open_engine: Callable[[], Engine]) -> None:
        self._open_engine = open_engine
        self._opening: Future[Engine] = Future()

    def __reduce__(self) -> tuple[type[EnginePlugin], tuple[Callable[[], Engine]]]:
        return type(self), (self._open_engine,)  # a plugin travels unopened

    def setup(self, worker: Any) -> None:
        """Begin to open the engine. A failure is kept for those who ask for it: here, it would only be a log line."""
        threading.Thread(target=self._open, name="open-engine", daemon=True).start()

    def _open(self) -> None:
        try:
            engine = self._open_engine()
        except Exception as error:
            logger.exception("the engine can't be opened")
            self._opening.set_exception(error)
        else:
            self._opening.set_result(engine)

    def teardown(self, worker: Any) -> None:
        """Close the engine; one that is still opening, as soon as it is open."""
        self._opening.add_done_callback(_close)

    @property
    def engine(self) -> Engine:
        """The engine, as soon as it is open; EngineError when it could not be opened."""
        try:
            return self._opening.result()
        except Exception as error:
            raise EngineError(
                f"the engine of this worker could not be opened: {type(error).__name__}: {error}"
            ) from error


def _close(opening: Future[Engine]) -> None:
    if opening.exception() is None:
        opening.result().close()


def worker_name() -> str:
    """Return the name of the Dask worker that runs the calling task; the host's where there is none."""
    try:
        return str(distributed.get_worker().name)
    except ValueError:
        return socket.gethostname()


def worker_engine() -> Engine:
    """Return the engine of the worker that runs the calling task.

    Raises:
        EngineError: it could not be opened.
        ShoalError: called outside a Dask task.
    """
    try:
        plugin = cast("EnginePlugin", distributed.get_worker().plugins[PLUGIN])
    except (ValueError, KeyError) as error:
        raise ShoalError(
            "there is no engine here: bundles are called on Dask workers that open_cluster made"
        ) from error
    return plugin.engine


class Heartbeat:
    """Writes a slot's beats into a small file, by replacing it, from a thread of its own.

    The thread tells that the process lives, the counts that the engine does: one that hangs in a call, with its
    process well, has beats whose counts stand still.
    """

    def __init__(self, folder: Path, worker: str, *, address: str = "", bundle: int = -1) -> None:
        attempt = uuid.uuid4().hex[:12]
        self._file = folder / f"{worker}.{os.getpid()}.{attempt}.json"
        self._beat = Beat(
            worker=worker,
            address=address,
            host=socket.gethostname(),
            process=os.getpid(),
            attempt=attempt,
            bundle=bundle,
            batch_id="",
            reads=0,
            samples=0,
            time=time.time(),
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_until_ended, name="heartbeat", daemon=True)
        self._write()
        self._thread.start()

    def ready(self) -> None:
        """Tell that the engine is open."""
        self._beat = replace(self._beat, ready=True)

    def beat(self, *, batch_id: str, reads: int, samples: int) -> None:
        """Tell the progress; the file tells it within a second."""
        self._beat = replace(self._beat, batch_id=batch_id, reads=reads, samples=samples)

    def end(self) -> None:
        """Take the file away: this slot has nothing to do."""
        self._ended.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _write(self) -> None:
        write_json(self._file, asdict(replace(self._beat, time=time.time())), durable=False)

    def _write_until_ended(self) -> None:
        while not self._ended.wait(BEAT_EVERY):
            try:
                self._write()
            except OSError as error:  # a full disk ends the bundle by itself; silence would end the worker
                logger.warning("the heartbeat can't be written: %s", error)


def heartbeat(folder: Path, *, bundle: int = -1) -> Heartbeat:
    """Make the heartbeat of the calling slot."""
    try:
        worker = distributed.get_worker()
    except ValueError:  # not on a worker
        return Heartbeat(folder, socket.gethostname(), bundle=bundle)
    return Heartbeat(folder, str(worker.name), address=worker.address, bundle=bundle)


def read_heartbeats(folder: Path) -> Iterator[Beat]:
    """Read the beats of all slots that work on a run."""
    for file in sorted(folder.glob("[!.]*.json")):
        with suppress(InputError):  # cut by a crash of its machine
            if (beat := read_json(file)) is not None:  # gone since it was listed
                yield Beat(**beat)


def clear_heartbeats(folder: Path, worker: str | None = None, process: int | None = None) -> None:
    """Take away the beats of a process or worker that is gone, or of all. Only for the flow that owns the run."""
    pattern = "*" if worker is None else f"{glob_escape(worker)}.{'*' if process is None else process}.*"
    for file in folder.glob(f"{pattern}.json"):
        file.unlink(missing_ok=True)
