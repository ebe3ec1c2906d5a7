"""The engine `dorado`: ONT's stand-alone program, run for one group of reads after another.

    reads --stage--> folder of POD5 --dorado basecaller--> SAM, line by line --> answers

The program loads its model anew each time, seconds to tens of seconds; so groups are large, bounded by samples on disk
rather than in memory, and while one group is called the next one is staged and its process started. Two processes at
once, no more: the second one's start hides behind the first one's calling, so the GPU always has work; and since dorado
sizes its batches by the memory that is free when it starts, two share a GPU, while more would starve each other.

A read that comes whole in one record is answered as the record comes. Parts of a split read carry their parent's id and
nothing says which is the last, and an aligned read may have more records; these are answered when the program has ended
well. So what is held is bounded by the group.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TextIO

from tasks.core.calls import BasecalledRead, EngineIdentity, Outcome
from tasks.core.dorado_program import (
    DEFAULT_MODEL,
    MIN_SAMPLES,
    Counted,
    Header,
    Record,
    Wanted,
    command_line,
    counted,
    is_complex,
    parse_record,
    sample_sheet,
    unexplained,
)
from tasks.core.errors import EngineError, SettingsError
from tasks.core.reads import Read
from tasks.engines.child import end, start
from tasks.engines.staged import StagedGroup
from tasks.settings import EngineSettings

logger = logging.getLogger(__name__)

#: Samples in a group, where the settings do not ask for more in flight: about 10 s of one H100 with a hac model, and
#: 1.3 GB of POD5.
GROUP_SAMPLES = 1_000_000_000
#: Processes at once: of a stream of reads, and of all workers that share a node's devices.
PROCESSES = 2
#: Seconds between looks whether another worker's process has ended.
TURN_EVERY = 0.2
#: Samples/s below which we take the program for stuck: a CPU with a fast model does several times as many.
SLOWEST = 100_000.0
#: Seconds that `dorado --version` may take.
VERSION_WITHIN = 60.0
#: Lines of its log that an error quotes, and read ids that it names.
QUOTED, NAMED = 8, 5
_VERSION = re.compile(r"\d+\.\d+\.\d+\S*")

_Answer = tuple[Read, Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class DoradoProgram:
    """Where the program is, and how a site runs it."""

    #: Its path, or its name where PATH finds it.
    program: str = "dorado"
    #: None: the devices that CUDA_VISIBLE_DEVICES names, or all.
    device: str | None = None
    arguments: tuple[str, ...] = ()
    models: Path | None = None
    #: Seconds until the first read is called, whatever the group's size.
    start_within: float = 900.0
    #: Folder for staged reads; None: that for temporary files.
    scratch: Path | None = None
    #: Folder for the program's logs; None: beside the staged reads, kept when it fails.
    logs: Path | None = None


def check_settings(settings: EngineSettings) -> None:
    """Raise SettingsError when the program can't do what the settings want; it says what can."""
    if settings.duplex:
        raise SettingsError(
            "engine.duplex: `dorado basecaller` calls simplex; leave duplex out, or choose engine 'dorado-server'"
        )
    if len(settings.barcode_kits) > 1:
        raise SettingsError(
            f"engine.barcode_kits: dorado takes one kit, not {', '.join(settings.barcode_kits)}; "
            "give one, or choose engine 'dorado-server'"
        )


def wanted_of(settings: EngineSettings, site: DoradoProgram, reference: Path | None) -> Wanted:
    """Say what to ask the program for.

    Raises:
        SettingsError: the program can't do it; says what can.
    """
    check_settings(settings)
    if settings.bed and not reference:
        raise SettingsError("engine.bed: needs output.reference, which reads are aligned to")
    # dorado has no switch for barcodes alone: what leaves barcodes on leaves primers on.
    kept_barcodes = bool(settings.barcode_kits) and not settings.barcode_trim and settings.trim == "all"
    return Wanted(
        model=settings.model or DEFAULT_MODEL,
        modified_bases=settings.modified_bases,
        moves=settings.moves,
        trim="adapters" if kept_barcodes else settings.trim,
        kit="".join(settings.barcode_kits),
        barcode_both_ends=settings.barcode_both_ends,
        poly_a=settings.poly_a,
        poly_a_config=str(settings.poly_a_config or ""),
        reference=str(reference or ""),
        bed=str(settings.bed or ""),
        device=site.device or "",
        models=str(site.models or ""),
        arguments=site.arguments,
    )


def find_program(program: str) -> str:
    """Return the program's path; SettingsError when there is none."""
    found = shutil.which(program)
    if found is None:
        raise SettingsError(
            f"dorado.program: {program!r} is not there, or can't be run; install ONT's dorado, "
            'and give its path in the site file: [dorado] program = "…/bin/dorado"'
        )
    return str(Path(found).absolute())


def program_version(program: str) -> str:
    """Ask the program for its version.

    Raises:
        SettingsError: it is not there.
        EngineError: it does not answer, or with something else.
    """
    path = find_program(program)
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=VERSION_WITHIN, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"`{path} --version` failed: {error}") from error
    told = _VERSION.search(done.stdout + done.stderr)  # which of the two has changed between versions
    if done.returncode or told is None:
        raise EngineError(
            f"`{path} --version` ended with status {done.returncode} and names no version: "
            f"{(done.stdout + done.stderr).strip()[-300:]!r}"
        )
    return told.group()


def model_argument(model: str, models: Path | None) -> str:
    """Return what to name a model by: dorado takes a complex or a path, so a name becomes its folder where we have it.

    Raises:
        SettingsError: it is neither a complex, nor a folder.
    """
    if is_complex(model):
        return model
    places = [Path(model), *([models / model] if models else [])]
    for place in places:
        if place.is_dir():
            return str(place.absolute())
    raise SettingsError(
        f"engine.model: {model!r} is none of fast, hac, sup (with @version if wanted), and no folder"
        f"{f', nor one in {models}' if models else ' (the site names no models folder)'}; "
        "`dorado download --model NAME --models-directory FOLDER` gets one"
    )


class DoradoProgramEngine:
    """Runs `dorado basecaller`. Several slots may call at the same time; each then has processes of its own."""

    def __init__(
        self,
        settings: EngineSettings,
        site: DoradoProgram,
        *,
        reference: Path | None = None,
        group_samples: int | None = None,
    ) -> None:
        """Find program and model.

        Args:
            reference: What the program aligns the reads to.
            group_samples: Samples of a group; None: GROUP_SAMPLES, or the reads in flight where those are more.

        Raises:
            SettingsError: program or model are not there, or can't do what the settings want.
        """
        self._settings = settings
        self._site = site
        self._wanted = wanted_of(settings, site, reference)
        self._model = model_argument(self._wanted.model, site.models)
        self._program = find_program(site.program)
        self._group_samples = group_samples or max(GROUP_SAMPLES, settings.in_flight_samples)
        #: Signal kept in memory, per group: one is staged while PROCESSES are called.
        self._hold = settings.in_flight_samples // (PROCESSES + 1)
        if site.scratch is not None:
            site.scratch.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-dorado-", dir=site.scratch))
        self._lock = threading.Lock()
        self._live: set[_Process] = set()
        self._numbers = count()
        self._identified = False
        self._closed = False
        devices = site.device or os.environ.get("CUDA_VISIBLE_DEVICES") or "all"
        #: Locks that a process holds while it runs, common to the workers of this node and user that share devices.
        self.turns = [
            self._folder.parent / f"shoal-dorado.{socket.gethostname()}.{os.getuid()}.{_plain(devices)}.{number}.lock"
            for number in range(PROCESSES)
        ]
        #: Until the first record: the model as the settings name it. Then, as the program names what it has chosen.
        self.identity = EngineIdentity(
            engine="dorado",
            version=program_version(self._program),
            model=Path(self._wanted.model).name,
            model_digest="",
            stride=0,
        )

    def basecall(self, reads: Iterable[Read]) -> Iterator[_Answer]:
        """Yield each read with its answer; in the order in which the program calls them."""
        running: deque[_Process] = deque()
        group: StagedGroup | None = None
        #: Answers without the program, held until it has said what it calls with: the first answer's reader wants that.
        refused: list[_Answer] = []
        try:
            for read in reads:
                if reason := _unfit(read):
                    refused.append((read, reason))
                    continue
                if group is not None and self._ends(group, read):
                    while len(running) >= PROCESSES:
                        yield from running[0].rest()
                        running.popleft().remove()
                    running.append(self._start(group))
                    group = None
                group = group or StagedGroup(self._new_folder(), read.run, hold=self._hold)
                try:
                    group.add(read)
                except (ValueError, RuntimeError) as error:
                    refused.append((read, Outcome.quarantined(f"exception: {type(error).__name__}: {error}")))
                for process in running:
                    yield from process.ready()
                if self._identified:
                    yield from refused
                    refused.clear()
            if group is not None and group.reads:
                running.append(self._start(group))
                group = None
            while running:
                yield from running[0].rest()
                running.popleft().remove()
            yield from refused
        finally:
            for process in running:
                process.remove()
            if group is not None:
                group.remove()

    def close(self) -> None:
        """End what runs, with all its children, and take the staged reads away. Harmless when called twice."""
        with self._lock:
            self._closed = True
            live = list(self._live)
        for process in live:
            process.end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ends(self, group: StagedGroup, read: Read) -> bool:
        """Tell whether a group is complete, given the read that comes next."""
        return (
            group.samples + read.num_samples > self._group_samples
            or (read.run is not group.run and read.run.key != group.run.key)
            or read.read_id in group.reads
        )

    def _new_folder(self) -> Path:
        with self._lock:
            return self._folder / f"group-{next(self._numbers)}"

    def _start(self, group: StagedGroup) -> _Process:
        group.close()
        sheet = ""
        if self._settings.barcodes:
            file = group.folder.with_suffix(".csv")
            file.write_text(
                sample_sheet(
                    self._wanted.kit,
                    self._settings.barcodes,
                    flow_cell=group.run.flow_cell_id,
                    experiment=group.run.experiment_name,
                ),
                "utf-8",
            )
            sheet = str(file)
        command = command_line(self._program, self._wanted, str(group.folder), sample_sheet=sheet, model=self._model)
        logs = self._site.logs or self._folder.parent
        log = logs / f"dorado.{socket.gethostname()}.{os.getpid()}.{group.folder.name}.{self._folder.name[-8:]}.log"
        with self._lock:
            if self._closed:
                group.remove()
                raise EngineError("the engine was closed while it had reads to call")
            process = _Process(self, group, command, log)
            self._live.add(process)
        return process

    def ended(self, process: _Process) -> None:
        """Forget a process."""
        with self._lock:
            self._live.discard(process)

    def identify(self, header: Header) -> None:
        """Learn from the program what it calls with.

        Raises:
            EngineError: it is another model than before.
        """
        told = header.identity()
        if told is None:
            return
        told = replace(told, version=told.version or self.identity.version)
        with self._lock:
            if self._identified and told.model != self.identity.model:
                raise EngineError(
                    f"dorado chose {told.model} for one run and {self.identity.model} for another; "
                    "call runs of different chemistry into output folders of their own, or name a model in full"
                )
            if not self._identified:
                self.identity = told
                self._identified = True

    @property
    def wanted(self) -> Wanted:
        """What the program is asked for."""
        return self._wanted

    @property
    def patience(self) -> float:
        """Seconds without output that any group is given."""
        return self._site.start_within

    @property
    def keeps_logs(self) -> bool:
        """Whether the logs of what went well are kept."""
        return self._site.logs is not None


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9,-]", "-", text)


def _unfit(read: Read) -> Outcome | None:
    """Answer a read that the program can't be given."""
    if not read.num_samples:
        return Outcome.skipped("too_short")
    if read.run.sample_rate <= 0:
        return Outcome.quarantined(f"sample_rate: {read.run.sample_rate} Hz")
    return None


class _Process:
    """The program on one group. A thread reads its output; the answers wait here until they are asked for."""

    def __init__(self, engine: DoradoProgramEngine, group: StagedGroup, command: list[str], log: Path) -> None:
        self._engine = engine
        self._group = group
        self._log = log
        self._header = Header()
        self._answers: SimpleQueue[_Answer | Exception | None] = SimpleQueue()
        #: Reads that have no answer yet, by id.
        self._left = dict(group.reads)
        #: Records of reads that may have more, by the read's id.
        self._open: dict[str, list[Record]] = {}
        #: Ids of the calls that have come.
        self._seen: set[str] = set()
        self._over = False
        self._heard = time.monotonic()
        self._silence = engine.patience + group.samples / SLOWEST
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        #: Held while the process is started or ended.
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pump, name=group.folder.name, daemon=True)
        self._thread.start()

    def ready(self) -> Iterator[_Answer]:
        """Yield the answers that are there, without waiting."""
        while not self._over:
            try:
                answer = self._answers.get_nowait()
            except Empty:
                self._check_silence()
                return
            yield from self._taken(answer)

    def rest(self) -> Iterator[_Answer]:
        """Yield all answers that are left, as they come."""
        while not self._over:
            try:
                answer = self._answers.get(timeout=1.0)
            except Empty:
                self._check_silence()
            else:
                yield from self._taken(answer)

    def end(self) -> None:
        """End the program, wherever it is."""
        with self._guard:
            if self._process is not None and not self._stop.is_set():
                end(self._process)
            self._stop.set()

    def remove(self) -> None:
        """End the program if it still runs, and take the staged reads away."""
        self.end()
        self._thread.join()
        self._group.remove()
        self._group.folder.with_suffix(".csv").unlink(missing_ok=True)
        self._engine.ended(self)

    def _taken(self, answer: _Answer | Exception | None) -> Iterator[_Answer]:
        if answer is None:
            self._over = True
        elif isinstance(answer, Exception):
            self._over = True
            raise answer
        else:
            yield answer

    def _check_silence(self) -> None:
        silent = time.monotonic() - self._heard
        if self._process is not None and self._process.poll() is None and silent > self._silence:
            self.end()
            raise EngineError(
                f"dorado has printed nothing for {silent:.0f} s, with {len(self._left)} reads "
                f"({self._group.samples} samples staged) to call, and was ended{self._quoted()}"
            )

    def _pump(self) -> None:
        """Start the program when it is its turn, and read its output to the end; in a thread that lives as long."""
        try:
            with self._turn():
                self._read()
        except Exception as error:
            if not isinstance(error, EngineError):
                logger.exception("dorado's output can't be read")
                error = EngineError(f"dorado's output can't be read: {type(error).__name__}: {error}{self._quoted()}")
            self.end()
            self._answers.put(error)
        else:
            if not self._engine.keeps_logs:
                self._log.unlink(missing_ok=True)
            self._answers.put(None)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait until fewer than PROCESSES run on our devices, and count as one of them."""
        with ExitStack() as files:
            locks = [files.enter_context(path.open("a")) for path in self._engine.turns]
            while not any(map(_locked, locks)):
                if self._stop.wait(TURN_EVERY):
                    raise EngineError("the engine was closed while it had reads to call")
            yield

    def _start(self) -> subprocess.Popen[bytes]:
        with self._guard:
            if self._stop.is_set():
                raise EngineError("the engine was closed while it had reads to call")
            logger.info(
                "calling %d reads, %d samples: %s",
                len(self._group.reads),
                self._group.samples,
                " ".join(self._command),
            )
            try:
                self._process = start(self._command, log=self._log, environment=os.environ)
            except OSError as error:
                raise EngineError(f"{self._command[0]} can't be started: {error}") from error
            self._heard = time.monotonic()
            return self._process

    def _read(self) -> None:
        process = self._start()
        assert process.stdout is not None
        with process.stdout as output:
            for line in output:
                self._heard = time.monotonic()
                if not line.endswith(b"\n"):
                    raise EngineError(
                        f"dorado's output ends in the middle of a record (it ended with {_status(process.wait())})"
                        f"{self._quoted()}"
                    )
                if line.startswith(b"@"):
                    self._header.take(line.decode())
                else:
                    self._take(line.decode())
        if status := process.wait():
            raise EngineError(f"dorado ended with {_status(status)}{self._quoted()}")
        self._finish()

    def _take(self, line: str) -> None:
        if not self._seen:
            self._engine.identify(self._header)
        wanted = self._engine.wanted
        try:
            record = parse_record(line, self._header, barcoded=bool(wanted.kit))
        except ValueError as error:
            raise EngineError(f"dorado printed what is no record: {error}{self._quoted()}") from error
        parent = record.parent_read_id
        if record.call is not None and record.read_id in self._seen:
            raise EngineError(f"dorado called read {record.read_id} twice{self._quoted()}")
        if parent not in self._left:
            known = "has been called whole already" if parent in self._group.reads else "was not given to it"
            raise EngineError(f"dorado called {record.read_id}, but read {parent} {known}{self._quoted()}")
        if record.call is not None:
            self._seen.add(record.read_id)
        if record.read_id == parent and record.call is not None and not wanted.reference:
            if parent in self._open:
                raise EngineError(f"dorado called read {parent} both whole and in parts{self._quoted()}")
            self._answers.put((self._left.pop(parent), Outcome.called(record.call)))
        else:
            self._open.setdefault(parent, []).append(record)

    def _finish(self) -> None:
        """Answer the reads that could not be before: the program has ended well, so no more records come."""
        count_ = counted(self._log.read_text("utf-8", "replace"))
        if count_.basecalled is not None and count_.basecalled != len(self._seen):
            raise EngineError(
                f"dorado has counted {count_.basecalled} calls, but {len(self._seen)} have come{self._quoted()}"
            )
        whole = {parent: self._calls(parent, records) for parent, records in self._open.items()}
        missing = [(read.read_id, read.num_samples) for read in self._left.values() if read.read_id not in whole]
        if lost := unexplained(missing, count_):
            raise EngineError(f"dorado left out {_some(lost)}{_of(count_)}{self._quoted()}")
        for read_id, read in self._left.items():
            if read_id in whole:
                outcome = Outcome.called(*whole[read_id])
            else:
                outcome = Outcome.skipped("too_short" if read.num_samples < MIN_SAMPLES else "no_bases")
            self._answers.put((read, outcome))
        self._left.clear()

    def _calls(self, parent: str, records: list[Record]) -> list[BasecalledRead]:
        """Gather a read's calls, each with its alignments; parts of a split read in the order of its signal."""
        calls = [record.call for record in records if record.call is not None]
        whole = [call for call in calls if not call.split]
        if whole and len(calls) > len(whole):
            raise EngineError(f"dorado called read {parent} both whole and in parts{self._quoted()}")
        lines: dict[str, list[str]] = {call.read_id: [] for call in calls}
        for record in sorted(records, key=lambda record: record.call is None):  # the primary one first
            if record.read_id not in lines:
                raise EngineError(f"dorado aligned {record.read_id} without calling it{self._quoted()}")
            lines[record.read_id].append(record.line)
        if self._engine.wanted.reference:
            calls = [replace(call, alignments=tuple(lines[call.read_id])) for call in calls]
        return sorted(calls, key=lambda call: call.split_point)

    def _quoted(self) -> str:
        """Name the log and quote its end."""
        with suppress(OSError):
            lines = self._log.read_text("utf-8", "replace").strip().splitlines()[-QUOTED:]
            if lines:
                return f"; its log {self._log} ends with:\n" + "\n".join(lines)
        return f"; its log is {self._log}"


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _status(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def _some(read_ids: tuple[str, ...]) -> str:
    named = ", ".join(read_ids[:NAMED])
    return f"{len(read_ids)} reads: {named}{', …' if len(read_ids) > NAMED else ''}"


def _of(count_: Counted) -> str:
    return f" (it says that it has dropped {count_.filtered or 0})"
