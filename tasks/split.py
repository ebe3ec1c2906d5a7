"""Split: a bundle in, committed batches out.

One thread pulls: it reads a group of reads, the engine takes them as it has room, and what it answers is formatted and
compressed. Another commits, for a commit waits for the disk.

    pod5 --reads--> engine --answers--> format, compress --whole batches--> commit

Nothing is queued between these but in the engine, which bounds what it holds, in samples; so memory does not grow with
batch, file or length of reads. One thread, since each hand-over of Python's lock costs more than reading a short read:
three threads took twice the CPU. What overlaps is the engine's own work, and the slots and workers beside this one.

One stream runs through all batches of the bundle: reads of the next batch are with the engine while the last ones of
this batch come back, so the engine never runs dry between batches. Answers may come in any order; within a batch,
records are written in input order, so that the same input and engine give the same bytes. A batch commits as soon as
its own last read is answered.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.batches import Batch, Bundle, Slice
from tasks.core.calls import Fate, Outcome
from tasks.core.errors import EngineError, InputError, SupersededError
from tasks.core.reads import Read, RunInfo
from tasks.core.suspects import MOST, STRIKES, Suspects, is_given_up
from tasks.engines.base import Engine
from tasks.formats.commit import FATES, commit, committed_ids, staging
from tasks.formats.outputs import BatchOutputs, Writing
from tasks.formats.planfile import read_id_text, read_reads_of
from tasks.formats.pod5 import Unreadable, format_read_id, read_rows
from tasks.formats.workspace import Workspace, read_json, write_json
from tasks.metrics import Metrics
from tasks.settings import OutputSettings

logger = logging.getLogger(__name__)

#: Samples and reads that pass a stage at once: a look at the clock per group, not per read.
GROUP_SAMPLES = 250_000
GROUP_READS = 64
#: Whole batches that wait for the disk.
COMMITS_WAITING = 2

FATE_COLUMNS = pa.schema(
    [
        ("read_id", pa.binary(16)),
        ("run", pa.int16()),
        ("file", pa.string()),
        ("fate", pa.string()),
        ("reason", pa.string()),
        ("products", pa.int32()),
        ("bases", pa.int64()),
    ]
)

T = TypeVar("T")
Answer = tuple[Read | Unreadable, Outcome]
#: Told after each group of answers: batch id, reads answered in it, reads and samples answered in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleReport:
    """What came of a bundle: small, for it crosses Dask."""

    committed: int
    superseded: int
    reads: int
    samples: int
    #: Name of the Dask worker.
    worker: str = ""


def basecall_bundle(
    workspace: Workspace,
    bundle: Bundle,
    engine: Engine,
    output: OutputSettings,
    *,
    min_qscore: float,
    run_numbers: dict[tuple[str | int, ...], int],
    progress: Progress = lambda batch_id, reads, samples: None,
    carefully: bool = False,
    accept_missing: bool = False,
) -> BundleReport:
    """Call the batches of a bundle as one stream, and commit each.

    Batches that another attempt has committed meanwhile are passed over. Safe to repeat at any time. What can't be read
    of a file that is there and whole is quarantined.

    Args:
        run_numbers: The plan's number of each run, by its key.
        progress: Told of answered reads.
        carefully: The bundle is one batch that failed again and again: call it range by range, and leave a note of
            the range, so that the next attempt knows where this one failed (tasks/core/suspects.py).
        accept_missing: Quarantine the reads of files that are gone, cut short or replaced, and do not wait for them.

    Raises:
        EngineError: the engine broke. Batches committed before stay committed.
        InputError: an input file is gone, cut short, replaced, or can't be opened, which may pass.
    """
    done = committed_ids(workspace)
    batches = [batch for batch in bundle.batches if batch.batch_id not in done]
    if not batches:
        return BundleReport(committed=0, superseded=len(bundle.batches), reads=0, samples=0)
    search = _Search(workspace, batches[0]) if carefully else None
    writing = Writing.of(engine.identity, output, min_qscore)
    pipeline = _Pipeline(workspace, batches, engine, writing, run_numbers, progress, search, accept_missing)
    try:
        return pipeline.run()
    except Exception:
        if search is not None:
            search.stop()
        raise


class _Pipeline:
    """One bundle on its way through reading, calling, writing."""

    def __init__(
        self,
        workspace: Workspace,
        batches: Sequence[Batch],
        engine: Engine,
        writing: Writing,
        run_numbers: dict[tuple[str | int, ...], int],
        progress: Progress,
        search: _Search | None,
        accept_missing: bool,
    ) -> None:
        self.workspace = workspace
        self.batches = batches
        self.engine = engine
        self._writing = writing
        self.run_numbers = run_numbers
        self.progress = progress
        self.search = search
        self.accept_missing = accept_missing
        self.attempt = uuid.uuid4().hex[:12]
        self.metrics = Metrics()
        self._last_run: RunInfo | None = None
        self._last_number: int | None = None
        #: The bundle's reads as the plan has them, by position.
        self.planned = read_reads_of(workspace, tuple(batch.number for batch in batches))
        #: Reads that can't be read, answered without the engine.
        self.unreadable: deque[Answer] = deque()
        #: Position of each batch's first read in the bundle.
        self.starts = [0]
        for batch in batches:
            self.starts.append(self.starts[-1] + batch.reads)

    @property
    def writing(self) -> Writing:
        """How calls are written. Some engines know what they call with only when the first read is called."""
        if self._writing.identity is not self.engine.identity:
            self._writing = replace(self._writing, identity=self.engine.identity)
        return self._writing

    def run(self) -> BundleReport:
        self.clock = self.metrics.clock()
        writers: dict[int, _BatchWriter] = {}
        committing: deque[Future[bool]] = deque()
        won = reads = samples = 0
        began = time.time()
        with ExitStack() as attempts, ThreadPoolExecutor(1, "commit") as committer:
            for answered, size in self._answers():
                touched = set()
                for read, outcome in answered:
                    number = bisect_right(self.starts, read.position) - 1
                    if number not in writers:
                        writers[number] = attempts.enter_context(_BatchWriter(self, number, began))
                    writers[number].add(read, outcome)
                    touched.add(number)
                reads += len(answered)
                samples += size
                self.clock.mark("formatting", len(answered))
                self.clock.mark("compressing", 0, sum(writers[number].compress() for number in touched))
                for number in sorted(touched):
                    self.progress(self.batches[number].batch_id, reads, samples)
                    if writers[number].complete:
                        if len(committing) == COMMITS_WAITING:
                            won += committing.popleft().result()
                            self.clock.mark("waiting_to_commit")
                        committing.append(committer.submit(writers.pop(number).commit))
                began = time.time()
            won += sum(future.result() for future in committing)
            self.clock.mark("waiting_to_commit")
            if reads != self.starts[-1]:
                raise EngineError(
                    f"the engine ended with {self.starts[-1] - reads} reads of {len(self.batches)} batches unanswered"
                )
        return BundleReport(committed=won, superseded=len(self.batches) - won, reads=reads, samples=samples)

    def _answers(self) -> Iterator[tuple[Sequence[Answer], int]]:
        """Read and call; yield answers in groups, each with its samples."""
        called = self.engine.basecall(self._reads()) if self.search is None else self._carefully(self.search)
        for group, samples in _groups(called, lambda answer: answer[0].num_samples):
            self.clock.mark("calling", len(group), 2 * samples)
            yield group, samples
            yield from self._unread()
        yield from self._unread()

    def _carefully(self, search: _Search) -> Iterator[tuple[Read, Outcome]]:
        """Call range by range; reads that are quarantined are answered without the engine."""
        for start, reads in groupby(self._reads(), key=lambda read: search.range_of(read.position)):
            healthy = []
            for read in reads:
                if read.position in search.quarantined:
                    cause = search.quarantined[read.position]
                    yield (
                        read,
                        Outcome.quarantined(
                            f"poison: the engine or its worker broke {STRIKES} times over this read alone: {cause}; "
                            f"its signal is in {read.file}, row {read.row}"
                        ),
                    )
                else:
                    healthy.append(read)
            search.begin(start)
            owed = len(healthy)
            try:
                for answer in self.engine.basecall(healthy):
                    owed -= 1
                    yield answer
                if owed > 0:
                    raise EngineError(f"the engine left {owed} of {len(healthy)} reads unanswered")
            except Exception as error:
                search.blame(error)
                raise
            search.stop()

    def _unread(self) -> Iterator[tuple[Sequence[Answer], int]]:
        while self.unreadable:
            yield [self.unreadable.popleft()], 0

    def _reads(self) -> Iterator[Read]:
        """Read the bundle's rows; the engine pulls them."""
        for group, samples in _groups(self._rows(), lambda read: read.num_samples):
            self.clock.mark("reading", len(group), 2 * samples)
            yield from group
            self.clock.mark("calling")

    def _rows(self) -> Iterator[Read]:
        position = 0
        for batch in self.batches:
            for part in batch.slices:
                for read in self._slice(part, position):
                    if isinstance(read, Read):
                        yield read
                    else:
                        self.unreadable.append((read, Outcome.quarantined(read.reason)))
                position += part.stop - part.start

    def _slice(self, part: Slice, position: int) -> Iterator[Read | Unreadable]:
        """Read the rows of a slice; from where its file can't be read on, answer for the reads that are planned there.

        Raises:
            InputError: the file can't be read, or holds other reads by now; but another try may find it whole.
        """
        stop = position + part.stop - part.start
        planned = zip(
            read_id_text(self.planned.read_ids[position:stop]).to_pylist(),
            self.planned.num_samples[position:stop].tolist(),
            self.planned.run[position:stop].tolist(),
            strict=True,
        )
        try:
            for read, (read_id, samples, run) in zip(
                read_rows(part.file, part.start, part.stop, position), planned, strict=True
            ):
                if read.read_id != read_id or (
                    isinstance(read, Read) and (read.num_samples != samples or self._number_of(read.run) != run)
                ):
                    row = part.stop - (stop - position)
                    message = f"row {row} is not read {read_id} of {samples} samples that was planned; plan again"
                    raise InputError(part.file, "changed", message)
                yield read
                position += 1
        except InputError as error:
            given_up = is_given_up(
                error.reason,
                missing_accepted=self.accept_missing,
                last_resort=self.search is not None,
                folder_is_there=_has_files(Path(os.path.realpath(error.path)).parent),
            )
            if not given_up:
                raise
            logger.warning("%d reads are quarantined: %s", stop - position, error)
            for place in range(position, stop):
                read_id = format_read_id(self.planned.read_ids[place].tobytes())
                yield Unreadable(read_id=read_id, position=place, reason=f"{error.reason}: {error}")

    def _number_of(self, run: RunInfo) -> int | None:
        """Return the plan's number of a run; None where it has none. Quick for the run asked for last."""
        if run is not self._last_run:
            self._last_run, self._last_number = run, self.run_numbers.get(run.key)
        return self._last_number


class _Search:
    """The search for the read that breaks a batch, kept in a file that outlives the worker."""

    def __init__(self, workspace: Workspace, batch: Batch) -> None:
        self._file = workspace.suspects / f"{batch.batch_id}.json"
        self._file.parent.mkdir(exist_ok=True)
        self._suspects = (read_suspects(workspace, batch) or Suspects.of(batch.reads)).narrowed()
        self._starts = [start for start, _ in self._suspects.ranges]
        self._blamed = False
        #: Why reads are quarantined, by position.
        self.quarantined = dict(zip(self._suspects.quarantined, self._suspects.causes, strict=True))

    def range_of(self, position: int) -> int:
        """Return the first position of the range that a read is in."""
        return self._starts[bisect_right(self._starts, position) - 1]

    def begin(self, start: int) -> None:
        """Note that a range is being called: if that is the last thing we do, it is its fault."""
        self._note(replace(self._suspects, calling=start))

    def blame(self, error: Exception) -> None:
        """Note that the engine broke over the range that is being called."""
        self._blamed = True
        self._note(replace(self._suspects, calling=self._noted.calling, error=f"{type(error).__name__}: {error}"))

    def stop(self) -> None:
        """Note that the range went through, or that what went wrong is not its fault."""
        if not self._blamed:
            self._note(self._suspects)

    def _note(self, suspects: Suspects) -> None:
        self._noted = suspects
        write_json(self._file, asdict(suspects))


def read_suspects(workspace: Workspace, batch: Batch) -> Suspects | None:
    """Return where the search in a batch stands; None when none was begun."""
    noted = read_json(workspace.suspects / f"{batch.batch_id}.json")
    if noted is None:
        return None
    return Suspects(
        ranges=tuple((start, stop) for start, stop in noted["ranges"]),
        strikes=tuple((position, count) for position, count in noted["strikes"]),
        quarantined=tuple(noted["quarantined"]),
        causes=tuple(noted["causes"]),
        calling=noted["calling"],
        error=noted["error"],
    )


def forget_hopeless(workspace: Workspace) -> None:
    """Begin the search anew where it found the engine at fault: it may have been mended."""
    for file in workspace.suspects.glob("[!.]*.json"):
        if len(read_json(file)["quarantined"]) > MOST:
            file.unlink()


def _has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _groups(things: Iterable[T], samples_of: Callable[[T], int]) -> Iterator[tuple[list[T], int]]:
    """Gather a stream into groups, each with the samples in it."""
    group: list[T] = []
    samples = 0
    for thing in things:
        group.append(thing)
        samples += samples_of(thing)
        if samples >= GROUP_SAMPLES or len(group) >= GROUP_READS:
            yield group, samples
            group, samples = [], 0
    if group:
        yield group, samples


class _BatchWriter:
    """Writes one batch, in input order, into its staging folder.

    `began`: seconds since the epoch when its first reads went to the engine, long before their answers come.
    """

    def __init__(self, pipeline: _Pipeline, number: int, began: float) -> None:
        self.pipeline = pipeline
        self.batch = pipeline.batches[number]
        self.next = pipeline.starts[number]
        self.stop = pipeline.starts[number + 1]
        self.began = began
        self.early: dict[int, tuple[Read | Unreadable, Outcome]] = {}
        self.fates: list[tuple[bytes, int, str, str, str, int, int]] = []
        self._exit = ExitStack()

    def __enter__(self) -> _BatchWriter:
        self.folder = self._exit.enter_context(
            staging(self.pipeline.workspace, self.batch.batch_id, self.pipeline.attempt)
        )
        self.outputs = BatchOutputs(self.folder, self.pipeline.writing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @property
    def complete(self) -> bool:
        """Whether every read of the batch is answered and written."""
        return self.next == self.stop

    def add(self, read: Read | Unreadable, outcome: Outcome) -> None:
        """Take an answer; write it, and those it was waited for, when it is the next in order."""
        if read.position < self.next or read.position in self.early:
            raise EngineError(f"the engine answered read {read.read_id} twice")
        self.early[read.position] = (read, outcome)
        while self.next in self.early:
            self._write(*self.early.pop(self.next))
            self.next += 1

    def _write(self, read: Read | Unreadable, outcome: Outcome) -> None:
        run = int(self.pipeline.planned.run[read.position])
        bases = 0
        if outcome.calls and isinstance(read, Read):
            try:
                bases = self.outputs.add(run, read, outcome.calls)
            except InputError as error:
                outcome = Outcome.quarantined(f"{error.reason}: {error}")
        self.fates.append(
            (
                bytes.fromhex(read.read_id.replace("-", "")),
                run,
                read.file if isinstance(read, Read) else "",
                outcome.fate.value,
                outcome.reason,
                len(outcome.calls),
                bases,
            )
        )

    def compress(self) -> int:
        """Write the records formatted since the last call; return their bytes."""
        return self.outputs.compress()

    def commit(self) -> bool:
        """Finish the files and make them the batch's result; False when another attempt was first.

        Runs in the committing thread, while the next batch is called.
        """
        clock = self.pipeline.metrics.clock()
        written = self.outputs.close()
        columns = zip(*self.fates, strict=True)
        fates = [pa.array(column, field.type) for column, field in zip(columns, FATE_COLUMNS, strict=True)]
        pq.write_table(pa.table(fates, FATE_COLUMNS), self.folder / FATES)
        counted = Counter(row[3] for row in self.fates)
        counts = {fate.value: counted[fate.value] for fate in Fate}
        clock.mark("committing")
        manifest = {
            "batch": self.batch.number,
            "batch_id": self.batch.batch_id,
            "attempt": self.pipeline.attempt,
            "reads": self.batch.reads,
            "samples": self.batch.samples,
            "bases": sum(row[6] for row in self.fates),
            "products": sum(row[5] for row in self.fates),
            "fates": counts,
            **written,
            "began": self.began,
            "ended": time.time(),
            "engine": asdict(self.outputs.identity),
            "worker": f"{socket.gethostname()} {os.getpid()}",
            "metrics": self.pipeline.metrics.since_last(),
        }
        try:
            commit(self.pipeline.workspace, self.batch.batch_id, self.folder, manifest)
        except SupersededError as error:
            logger.warning("%s", error)
            return False
        logger.info(
            "batch %s committed: %d reads, %d samples, %d called, %d skipped, %d quarantined",
            self.batch.batch_id,
            self.batch.reads,
            self.batch.samples,
            *(counts[fate.value] for fate in (Fate.CALLED, Fate.SKIPPED, Fate.QUARANTINED)),
        )
        logger.debug("batch %s took %s", self.batch.batch_id, manifest["metrics"])
        return True
