"""Stand-ins that Dask workers import by name; each is a plain class or function, nothing is patched."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil

from infra.workers import worker_engine
from tasks.core.calls import EngineIdentity, Outcome
from tasks.core.errors import EngineError
from tasks.core.reads import Read
from tasks.engines.null import NullEngine


class FakeEngine:
    """Answers every read with the outcome it was made with, and leaves a mark when opened and when closed."""

    identity = EngineIdentity(engine="fake", version="1", model="none", model_digest="", stride=1)

    def __init__(self, folder: Path, outcome: Outcome | None = None) -> None:
        self._folder = folder
        self._outcome = outcome
        (folder / f"opened-{os.getpid()}").touch()

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        for read in reads:
            assert self._outcome is not None
            yield read, self._outcome

    def close(self) -> None:
        (self._folder / f"closed-{os.getpid()}").touch()


def open_fake(folder: Path) -> FakeEngine:
    """Open a fake engine; its marks go to `folder`."""
    return FakeEngine(folder)


def open_broken() -> FakeEngine:
    """Fail as an engine does whose GPU has gone."""
    raise EngineError("no GPU answers on device 3")


def engine_and_process(number: int) -> tuple[int, str, int]:
    """Say which engine and process a task got. Runs on a worker."""
    return number, worker_engine().identity.engine, os.getpid()


def worker_environment(name: str) -> str | None:
    """Return what a worker's environment says."""
    return os.environ.get(name)


def wait_for_gate(number: int, folder: Path) -> tuple[int, str, int]:
    """Tell that we are here, wait until the gate is opened, and say which engine and process we had."""
    (folder / f"began-{number}-{os.getpid()}").touch()
    deadline = time.monotonic() + 600
    while not (folder / "gate").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return engine_and_process(number)


def open_slowly(folder: Path, seconds: float) -> FakeEngine:
    """Take a while, as an engine does that loads a large model."""
    time.sleep(seconds)
    return open_fake(folder)


def open_large(folder: Path, size: int) -> FakeEngine:
    """Open an engine with which its process takes so many bytes of memory."""
    engine = open_fake(folder)
    engine.weights = bytearray(b"w") * (size - psutil.Process().memory_info().rss)  # type: ignore[attr-defined]
    return engine


def open_slowly_again(folder: Path, seconds: float) -> FakeEngine:
    """Take a while, but for the first process that asks."""
    return open_slowly(folder, seconds if list(folder.glob("opened-*")) else 0.0)


class PoisonedEngine:
    """Makes bases up, and breaks over some reads: `raises` an error, `kills` its process, or `hangs`."""

    def __init__(self, poison: Mapping[str, str]) -> None:
        self._engine = NullEngine()
        self.identity = self._engine.identity
        self._poison = poison

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        yield from self._engine.basecall(self._checked(reads))

    def close(self) -> None:
        self._engine.close()

    def _checked(self, reads: Iterable[Read]) -> Iterator[Read]:
        for read in reads:
            self.touch(self._poison.get(read.read_id, ""))
            yield read

    def touch(self, poison: str) -> None:
        """Do what a read does to whoever touches it."""
        if poison == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if poison == "hangs":
            time.sleep(3600)
        if poison == "raises":
            raise EngineError("the GPU fell off the bus")


def open_poisoned(poison: Mapping[str, str]) -> PoisonedEngine:
    """Open an engine that some reads break."""
    return PoisonedEngine(poison)


class BrokenEngine(PoisonedEngine):
    """Calls nothing, and says so at once."""

    def touch(self, poison: str) -> None:
        """Fail over any read."""
        raise EngineError("no GPU")


def open_first_broken(mark: Path) -> PoisonedEngine | NullEngine:
    """Open an engine that calls nothing in the first process that asks, and one that takes its time in all others."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return NullEngine(rate=400_000)
    return BrokenEngine({})
