"""The engine that holds clients of ONT's basecall server, by the published API of ont-pybasecall-client-lib.

Each slot of a worker has a client of its own, kept open from bundle to bundle. Reads are known by their tag, never by
their id. What the server owes us is bounded in samples, has a deadline, and is submitted again on a fresh connection
when the old one is lost or the server stalls; a server of ours is then started again by who holds it (`Server`).

This is the only module that imports the library, and it does so when an engine is opened: Shoal works without it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from tasks.core.calls import EngineIdentity, Outcome
from tasks.core.dorado import (
    ModelSet,
    Parameters,
    Patience,
    Pulse,
    ServerCounts,
    Verdict,
    Waiting,
    client_parameters,
    judge,
    packaged,
    remedy,
    unfit,
    verdict,
    version_mismatch,
)
from tasks.core.dorado_calls import outcome_of, parts_of
from tasks.core.errors import EngineError, SettingsError
from tasks.core.reads import Read
from tasks.settings import EngineSettings

logger = logging.getLogger(__name__)

#: Milliseconds that a server has to answer a question about itself; the library tries four times.
ASK_MS = 1000
#: Milliseconds that the library waits for room in its queue before we look for answers again.
PASS_MS = 50
#: Seconds between looks for answers when there is nothing to submit: the library has no call that waits for them.
NAPS = (0.001, 0.05)
#: Samples and reads that are passed at once. The library's messages hold 256,000 samples.
GROUP_SAMPLES, GROUP_READS = 250_000, 64
#: Seconds without our looking, after which silence is nobody's fault but ours.
AWAY = 5.0
#: Reads on channels that no flow cell has make the server let go of those that it kept for pairing.
FLUSH_CHANNELS = range(90_000, 90_010)
FLUSH_AFTER = 10.0


@dataclass(frozen=True, slots=True)
class Served:
    """Where a server is, and which start of it."""

    #: `ipc:///path` or `host:port`.
    address: str
    #: Rises with each start, so that one that was started again at the same address is told from the old one.
    generation: int = 0


class Server(Protocol):
    """Who holds the server. All slots of a worker share it, from threads of their own."""

    def serve(self) -> Served:
        """Return where the server is, starting it when it does not run yet. Cheap when it does."""

    def mend(self, seen: Served, *, stalled: bool) -> Served:
        """Put the server right that a client lost at `seen`, and return where it is now.

        Args:
            stalled: It is to be started again even when its process is alive.

        Raises:
            EngineError: it can't be, or was too often.
        """

    def close(self) -> None:
        """Need the server no longer. Harmless when called twice."""


class AttachedServer:
    """A server that somebody else starts and ends: all that we can do about it is to wait and try again."""

    def __init__(self, address: str, *, pause: float = 2.0) -> None:
        self._served = Served(address)
        self._pause = pause
        self._never = threading.Event()

    def serve(self) -> Served:
        """Return where it is."""
        return self._served

    def mend(self, seen: Served, *, stalled: bool) -> Served:
        """Give it a moment."""
        self._never.wait(self._pause)
        return self._served

    def close(self) -> None:
        """Leave it alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """What a server tells of itself."""

    version: str
    protocol: str
    #: Names of the GPUs that it uses.
    gpus: tuple[str, ...]
    driver: str
    #: Why our library can't talk to it; None when it can.
    mismatch: str | None


def client_library() -> Any:
    """Return the client class of ont-pybasecall-client-lib.

    Raises:
        EngineError: it is not installed here.
    """
    try:
        from pybasecall_client_lib.client_lib import BasecallClient
    except ImportError as error:
        raise EngineError(
            f"the engine dorado-server needs ont-pybasecall-client-lib, of the server's own version: "
            f"pip install 'shoal[ont]' ({error})"
        ) from error
    return BasecallClient


def library_version() -> str:
    """Return the version of the client library."""
    return ".".join(map(str, client_library().get_software_version()))


def library_protocol() -> str:
    """Return the version of the protocol that the client library speaks."""
    return ".".join(map(str, client_library().get_protocol_version()))


def ask_server(address: str, *, milliseconds: int = ASK_MS) -> ServerReport:
    """Ask a server about itself, on no connection of ours.

    Raises:
        ConnectionError: nobody answers there.
    """
    library = client_library()
    text, code = library.get_server_information(address, milliseconds)
    ours, protocol = tuple(library.get_software_version()), tuple(library.get_protocol_version())
    if code.name in ("bad_reply", "bad_request"):
        mismatch = version_mismatch(library=ours, library_protocol=protocol, server="", server_protocol="")
        return ServerReport(version="", protocol="", gpus=(), driver="", mismatch=mismatch)
    if code.name != "success":
        raise ConnectionError(f"no basecall server answers at {address} ({code.name})")
    try:
        told: dict[str, Any] = json.loads(text)
    except ValueError:
        told = {}
    devices = told.get("CUDA Devices")
    listed = [device for device in devices.values() if isinstance(device, dict)] if isinstance(devices, dict) else []
    version, spoken = str(told.get("guppy_version", "")), str(told.get("protocol_version", ""))
    return ServerReport(
        version=version,
        protocol=spoken,
        gpus=tuple(str(device["name"]) for device in listed if "name" in device),
        driver=str(told.get("NVIDIA Driver Version", "")),
        mismatch=version_mismatch(library=ours, library_protocol=protocol, server=version, server_protocol=spoken),
    )


def model_set(settings: EngineSettings, models: Path | None = None) -> ModelSet:
    """Return the models that the settings name.

    Args:
        models: Folder in which the site keeps models; those found there are given by their path.

    Raises:
        SettingsError: none is named, or a name is not whole.
    """
    if not settings.model:
        raise SettingsError(
            "engine.model: dorado-server needs one: a model or config that the server has, or a set simplex|mods|duplex"
        )
    try:
        found = ModelSet.parse(settings.model, settings.modified_bases)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if models is None:
        return found

    def path(name: str) -> str:
        return str(models / name) if name and (models / name).is_dir() else name

    return ModelSet(path(found.simplex), tuple(map(path, found.mods)), path(found.duplex))


class DoradoServerEngine:
    """Calls reads on a basecall server. A slot holds at most `in_flight_samples` of signal, or one read."""

    def __init__(
        self,
        settings: EngineSettings,
        server: Server,
        *,
        reference: Path | None = None,
        models: Path | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.settings = settings
        self.patience = patience or Patience()
        self.models = model_set(settings, models)
        self._server = server
        self._library = client_library()
        self._parameters = client_parameters(
            name=f"shoal {socket.gethostname()} {os.getpid()}",
            moves=settings.moves,
            mods=bool(self.models.mods),
            trim=settings.trim,
            barcode_kits=settings.barcode_kits,
            barcodes=settings.barcodes,
            barcode_both_ends=settings.barcode_both_ends,
            barcode_trim=settings.barcode_trim,
            poly_a=settings.poly_a,
            poly_a_config=str(settings.poly_a_config) if settings.poly_a_config else None,
            reference=str(reference) if reference else None,
            bed=str(settings.bed) if settings.bed else None,
            duplex=settings.duplex or bool(self.models.duplex),
        )
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._closed = False
        self._never = threading.Event()
        try:
            first = self.connect()
        except BaseException:
            server.close()
            raise
        self._idle.append(first)
        self.identity = EngineIdentity(
            engine="dorado-server",
            version=first.report.version or library_version(),
            model=first.model or self.models.name,
            model_digest="",
            stride=first.stride,
            gpu="|".join(dict.fromkeys(name.replace(" ", "_") for name in first.report.gpus)),
            modified_base_models=self.models.mod_names,
        )

    def basecall(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read with its answer, as the server gives them."""
        stream = _Stream(self, self._take())
        whole = False
        try:
            yield from stream.answers(reads)
            whole = True
        finally:
            with self._lock:
                keep = whole and not self._closed
                if keep:
                    self._idle.append(stream.connection)
            if not keep:
                stream.connection.close()  # and with it what is in flight

    def ask(self) -> ServerReport:
        """Ask the server about itself."""
        return ask_server(self._server.serve().address)

    def close(self) -> None:
        """Disconnect; a server of ours ends when nobody needs it."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for connection in idle:
            connection.close()
        self._server.close()

    def connect(self, seen: Served | None = None, *, stalled: bool = False) -> _Connection:
        """Open a connection.

        Args:
            seen: Where the connection was that is lost; the server is put right first.

        Raises:
            EngineError: the server can't be reached, or will not have us.
        """
        served = self._server.serve() if seen is None else self._server.mend(seen, stalled=stalled)
        for attempt in range(self.patience.attempts):
            try:
                return _Connection(self._library, served, self.models.config, self._parameters)
            except ConnectionError as error:
                lost = error
                logger.warning("%s; attempt %d of %d", lost, attempt + 1, self.patience.attempts)
                if attempt + 1 < self.patience.attempts:
                    self._never.wait(min(2.0**attempt, 30.0))
                    served = self._server.mend(served, stalled=attempt > 0)
        raise EngineError(f"the basecall server can't be reached, after {self.patience.attempts} attempts: {lost}")

    def _take(self) -> _Connection:
        """Take a connection that no slot uses, or open one."""
        while True:
            with self._lock:
                if self._closed:
                    raise EngineError("the engine is closed")
                if not self._idle:
                    break
                connection = self._idle.pop()
            if connection.usable and connection.served == self._server.serve():
                return connection
            connection.close()
        return self.connect()


class _Connection:
    """One client of the library, connected."""

    def __init__(self, library: Any, served: Served, config: str, parameters: Parameters) -> None:
        self._library = library
        self.served = served
        self.tags = count(1)
        # Asked first: it answers within its time limit, where connecting to nobody takes long.
        self.report = ask_server(served.address)
        if self.report.mismatch:
            raise EngineError(self.report.mismatch)
        self._client = library(served.address, config, 1)
        # A client of high priority changes the server's batches, and with them the bases.
        for name, value in {"priority": library.medium_priority, **parameters}.items():
            if (code := self._client.set_params({name: value}).name) != "success":
                raise EngineError(f"the client library refuses its parameter {name} = {value!r} ({code})")
        code = self._client.connect().name
        if code not in ("success", "already_connected"):
            told = self._client.get_error_message()
            self.close()
            if verdict(code) is Verdict.RECONNECT:
                raise ConnectionError(f"no connection to the basecall server at {served.address} ({code}): {told}")
            raise EngineError(f"basecall server at {served.address}: {remedy(code)} ({code}): {told}")
        details, code = self._client.get_basecalling_config()
        details = details if code.name == "success" and isinstance(details, dict) else {}
        #: Name of the model as the server tells it; empty when it does not.
        self.model = str(details.get("model_version_id") or "")
        self.stride = int(details.get("model_stride") or 0)

    @property
    def usable(self) -> bool:
        """Whether it is connected, as far as the library knows."""
        return bool(self._client.get_status().name == "connected")

    def submit(self, packages: list[dict[str, Any]]) -> str:
        """Pass reads, waiting a moment for room; return the code."""
        if len(packages) == 1:
            code = self._client.pass_read(packages[0], PASS_MS)
        else:
            code = self._client.pass_reads(packages, PASS_MS)
        name: str = code.name
        if verdict(name) is Verdict.RECONNECT:
            raise ConnectionError(f"the client at {self.served.address} takes no more reads ({name})")
        if verdict(name) is Verdict.FAIL:
            raise EngineError(f"basecall server at {self.served.address}: {remedy(name)}")
        return name

    def completed(self) -> list[list[dict[str, Any]]]:
        """Return what came back since the last call, a list of parts for each read."""
        status = self._client.get_status().name
        if status != "connected":
            told = self._client.get_error_message()
            raise ConnectionError(f"the connection to {self.served.address} is lost ({status}): {told}")
        answers: list[list[dict[str, Any]]] = self._client.get_completed_reads()
        return answers

    def counts(self) -> ServerCounts | None:
        """Ask the server how many reads went in and came out; None when it does not answer."""
        statistics, code = self._library.get_server_stats(self.served.address, ASK_MS)
        return ServerCounts.of(statistics) if code.name == "success" and statistics else None

    def close(self) -> None:
        """Disconnect, whatever state it is in."""
        with suppress(Exception):  # the native library's; there is nothing left to lose here
            self._client.disconnect()


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A read that the server owes us, or will."""

    read: Read
    #: How often it was submitted.
    times: int = 0
    #: Seconds of the monotonic clock.
    sent: float = 0.0
    due: float = 0.0
    #: Samples answered in the stream when it was first submitted.
    began: int = 0
    #: Samples answered in the stream by when it should have been passed on: twice what was ahead of it.
    turn: int = 0


class _Stream:
    """One call of `basecall`: reads on their way through the server and back."""

    def __init__(self, engine: DoradoServerEngine, connection: _Connection) -> None:
        self._engine = engine
        self._patience = engine.patience
        self._settings = engine.settings
        self.connection = connection
        #: By tag, in the order in which they were submitted.
        self._flights: dict[int, _Flight] = {}
        self._samples = 0
        #: To be submitted again, and the next ones to be submitted at all.
        self._again: deque[_Flight] = deque()
        self._held: list[_Flight] = []
        self._ready: deque[tuple[Read, Outcome]] = deque()
        self._ended = False
        self._mended = 0
        self._answered = self._split = self._called = 0
        #: Samples answered.
        self._passed = 0
        self._fakes: set[int] = set()
        self._flushed = False
        self._nap = NAPS[0]
        self._never = threading.Event()
        self._looked = self._heard = self._moved = self._asked = time.monotonic()
        self._counts: ServerCounts | None = None

    def answers(self, reads: Iterable[Read]) -> Iterator[tuple[Read, Outcome]]:
        """Yield each read with its answer."""
        source = iter(reads)
        while True:
            try:
                busy = self._submit(source)
                busy = self._collect() or busy
                self._look_after()
            except ConnectionError as error:
                self._mend(str(error), stalled=False)
                continue
            while self._ready:
                yield self._ready.popleft()
            if self._ended and not (self._flights or self._again or self._held or self._ready):
                break
            if busy:
                self._nap = NAPS[0]
            else:
                self._never.wait(self._nap)
                self._nap = min(2 * self._nap, NAPS[1])
        if self._answered + self._split != self._called:
            raise EngineError(
                f"the basecall server answered {self._answered} reads and split off {self._split}, "
                f"which are not the {self._called} that it returned"
            )

    def _submit(self, source: Iterator[Read]) -> bool:
        """Pass what there is room for; return whether anything was passed."""
        passed = False
        while self._gather(source):
            now = time.monotonic()
            if not self._flights:
                self._heard = self._moved = now
            tagged = {self._tag(): flight for flight in self._held}
            code = self.connection.submit([packaged(flight.read, tag) for tag, flight in tagged.items()])
            if code == "queue_full":
                break
            if code == "bad_read":
                self._refuse(tagged)
                continue
            passed = True
            for tag, flight in tagged.items():
                self._fly(tag, flight, now)
            self._held = []
            if self._ready or not self._room(GROUP_SAMPLES):
                break
        if self._ended and not self._flushed and self._flights:
            self._flush()
        return passed

    def _gather(self, source: Iterator[Read]) -> bool:
        """Fill the group that is passed next, as far as there is room; return whether there is one."""
        if len(self._held) == 1 and self._held[0].read.num_samples + self._samples > self._settings.in_flight_samples:
            return not self._flights  # one that waits for room; alone it always has some
        size = sum(flight.read.num_samples for flight in self._held)
        while size < GROUP_SAMPLES and len(self._held) < GROUP_READS and self._room(size):
            flight = self._next(source)
            if flight is None:
                break
            size += flight.read.num_samples
            if not self._room(size) and (self._held or self._flights):
                if self._held:
                    self._again.appendleft(flight)
                else:
                    self._held = [flight]
                    return False
                break
            self._held.append(flight)
        return bool(self._held)

    def _next(self, source: Iterator[Read]) -> _Flight | None:
        """Return the next read that is to be submitted; those that can't be are answered here."""
        if self._again:
            return self._again.popleft()
        if self._ended:
            return None
        for read in source:
            if reason := unfit(read):
                self._ready.append((read, Outcome.quarantined(f"unfit: {reason}")))
            elif not read.num_samples:
                self._ready.append((read, Outcome.skipped("too_short")))
            else:
                return _Flight(read)
        self._ended = True
        return None

    def _room(self, size: int) -> bool:
        """Say whether `size` more samples may be in flight."""
        return self._samples + size <= self._settings.in_flight_samples

    def _tag(self) -> int:
        """Return a tag that no read in flight has; unsigned, 32 bits."""
        while (tag := next(self.connection.tags) & 0xFFFFFFFF) in self._flights:
            pass
        return tag

    def _refuse(self, tagged: dict[int, _Flight]) -> None:
        """Deal with a bad read: alone, it is left out; in a group, each is passed alone."""
        if len(tagged) == 1:
            (flight,) = tagged.values()
            self._ready.append((flight.read, Outcome.quarantined("bad_read: the client library refuses it")))
        else:
            for flight in tagged.values():
                (tag,) = alone = {self._tag(): flight}
                code = "queue_full"
                while code == "queue_full":
                    self._collect()
                    code = self.connection.submit([packaged(flight.read, tag)])
                if code == "bad_read":
                    self._refuse(alone)
                    continue
                now = time.monotonic()
                self._fly(tag, flight, now)
        self._held = []

    def _fly(self, tag: int, flight: _Flight, now: float) -> None:
        """Note that the library has taken a read."""
        ahead = self._samples
        self._samples += flight.read.num_samples
        self._flights[tag] = replace(
            flight,
            times=flight.times + 1,
            sent=now,
            due=now + self._patience.deadline(flight.read.num_samples, ahead),
            began=flight.began if flight.times else self._passed,
            turn=self._passed + 2 * self._samples,
        )

    def _collect(self) -> bool:
        """Take what came back; return whether anything did."""
        groups = self.connection.completed()
        for group in groups:
            self._take(group)
        now = time.monotonic()
        if groups or now - self._looked > AWAY:
            self._heard = self._moved = now
        self._looked = now
        return bool(groups)

    def _take(self, group: list[dict[str, Any]]) -> None:
        """Take the answers to one read."""
        tag = int(group[0].get("read_tag", -1)) if group else -1
        if tag in self._fakes:
            return
        flight = self._flights.pop(tag, None)
        if flight is None:
            logger.warning("the basecall server answered tag %d, which it does not owe us; dropped", tag)
            return
        self._samples -= flight.read.num_samples
        self._passed += flight.read.num_samples
        self._answered += 1
        self._split += parts_of(group)
        self._called += len(group)
        self._ready.append((flight.read, self._outcome(flight.read, group)))

    def _outcome(self, read: Read, group: list[dict[str, Any]]) -> Outcome:
        try:
            return outcome_of(
                read,
                group,
                stride=self.connection.stride,
                moves=self._settings.moves,
                mods=bool(self._engine.models.mods),
                barcodes=bool(self._settings.barcode_kits),
                poly_a=self._settings.poly_a,
            )
        except Exception as error:  # of one read, whatever the server sent; the others go on
            logger.exception("the answer to read %s can't be used", read.read_id)
            return Outcome.quarantined(f"unusable_answer: {error}")

    def _look_after(self) -> None:
        """Judge the server by what it owes us, now and then, and act."""
        now = time.monotonic()
        every = min(5.0, self._patience.stall / 8)
        if not self._flights or now - self._asked < every:
            return
        self._asked = now
        silent = now - self._heard
        if silent > FLUSH_AFTER and self._settings.duplex:
            self._flush()
        if silent > every:
            counts = self.connection.counts()
            if counts and (self._counts is None or counts.reads_out != self._counts.reads_out):
                self._moved = now
            self._counts = counts
            self._looked = time.monotonic()  # a server that does not answer keeps us for seconds: those count
        late = {tag: flight for tag, flight in self._flights.items() if flight.due < now}
        waiting = Waiting(
            silent=silent,
            server_silent=now - self._moved,
            counts=self._counts,
            longest=max(flight.read.num_samples for flight in self._flights.values()),
            overdue=bool(late),
        )
        pulse = judge(waiting, self._patience)
        if pulse is Pulse.OVERDUE:
            # Only what others have overtaken: the rest waits its turn in a server that is merely slow.
            for tag, flight in late.items():
                if flight.turn < self._passed:
                    self._submit_again(tag, now)
        elif pulse is Pulse.STALLED:
            told = f"; {self._counts.reads_in} reads in, {self._counts.reads_out} out" if self._counts else ""
            self._mend(f"the basecall server stalled: nothing came out of it for {silent:.0f} s{told}", stalled=True)
        elif pulse is Pulse.LOST:
            for tag in [tag for tag, flight in self._flights.items() if self._hopeless(flight)]:
                self._submit_again(tag, now)
            if self._flights:
                self._mend(f"the basecall server lost reads: none came back for {silent:.0f} s", stalled=False)

    def _hopeless(self, flight: _Flight) -> bool:
        """Say whether a read was tried often enough, by a server that answered others meanwhile."""
        return flight.times >= self._patience.attempts and self._passed > flight.began

    def _submit_again(self, tag: int, now: float) -> None:
        """Give up on an answer, and on the read after so many times; one that comes late is dropped."""
        flight = self._flights.pop(tag)
        self._samples -= flight.read.num_samples
        if flight.times < self._patience.attempts:
            logger.warning("read %s: no answer in %.0f s; submitted again", flight.read.read_id, now - flight.sent)
            self._again.append(flight)
        else:
            reason = f"unanswered: submitted {flight.times} times, the last one {now - flight.sent:.0f} s ago"
            self._ready.append((flight.read, Outcome.quarantined(reason)))

    def _mend(self, reason: str, *, stalled: bool) -> None:
        """Go on with a fresh connection; what the old one owed us is submitted again, in its order."""
        self._mended += 1
        if self._mended > self._patience.attempts:
            raise EngineError(
                f"the basecall server at {self.connection.served.address} was lost {self._mended} times in one bundle, "
                f"now with {len(self._flights)} reads in flight; the last time: {reason}"
            )
        logger.warning("%s; %d reads will be submitted again", reason, len(self._flights))
        self._again.extendleft(reversed(self._held))
        self._again.extendleft(reversed(self._flights.values()))
        self._flights, self._held, self._samples = {}, [], 0
        self._fakes, self._flushed, self._counts = set(), False, None
        self.connection.close()
        self.connection = self._engine.connect(self.connection.served, stalled=stalled)
        self._looked = self._heard = self._moved = self._asked = time.monotonic()

    def _flush(self) -> None:
        """With duplex, make the server let go of reads that it keeps for pairing; their own answers are dropped."""
        self._flushed = True
        if not self._settings.duplex:
            return
        last = next(reversed(self._flights.values())).read
        for channel in FLUSH_CHANNELS:
            tag = self._tag()
            fake = replace(last, channel=channel, signal=last.signal[:1000].copy())
            if self.connection.submit([packaged(fake, tag)]) == "read_accepted":
                self._fakes.add(tag)
