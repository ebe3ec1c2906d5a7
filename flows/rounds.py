"""Rounds: bundles go out in a bounded window; what is not committed at the end of a round goes into the next.

Dask reruns what a dead worker held without Prefect's knowledge, and a task that kills its workers ends as KilledWorker,
which Prefect's retries never see. So the retry policy is here, and the folder of committed batches is its only memory.
"""

from __future__ import annotations

import logging
import queue
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client, get_run_logger, task
from prefect.artifacts import create_table_artifact, update_progress_artifact
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run, task_run
from prefect.states import Cancelled

from flows.pace import Pace, progress_words
from flows.telling import ALIVE, ASIDE, ENDED, LATE, is_late, tell
from infra.cluster import Cluster
from infra.site import Site
from infra.watchman import Watchman
from infra.workers import heartbeat, read_heartbeats, worker_engine, worker_name
from tasks.core.batches import Batch, Bundle
from tasks.core.crew import Ended, SetAside, died, to_set_aside
from tasks.core.errors import EngineError, InputError, StoppedError, WorkerError
from tasks.core.liveness import Beat
from tasks.core.plan import Plan
from tasks.engines.registry import min_qscore_of
from tasks.formats.commit import committed_ids
from tasks.formats.planfile import read_batches, read_plan
from tasks.formats.workspace import Workspace, write_json
from tasks.launch import bundles_left, estimated_seconds
from tasks.progress import RunProgress, Watch
from tasks.settings import OutputSettings, RunSettings
from tasks.split import BundleReport, basecall_bundle, forget_hopeless, read_suspects

logger = logging.getLogger(__name__)

#: Seconds between looks at the committed batches, for the progress artifact, and at the workers.
PROGRESS_INTERVAL = 5.0
LOOK_INTERVAL = 1.0
#: Batches left over above which no read is looked for, unless still more went through: the engine is at fault then.
MOST_SEARCHED = 8
#: Seconds between versions of the table of workers, each of which is a row in Prefect's database; and before the first.
TABLE_INTERVAL = 60.0
FIRST_TABLE = 10.0
#: Seconds that a finished bundle's result may take to come to us.
RESULT_WITHIN = 5.0
#: Seconds until a bundle is submitted again that could not begin or end since Prefect's API was away; and how often.
API_PAUSE = 10.0
API_ATTEMPTS = 60


def call_bundle(
    out: str,
    number: int,
    batches: tuple[int, ...],
    reads: int,
    output: OutputSettings,
    min_qscore: float,
    carefully: bool = False,
    accept_missing: bool = False,
) -> BundleReport:
    """Call one bundle on the worker's engine. Runs on a Dask worker; only names and numbers come and go."""
    workspace = Workspace(Path(out))
    plan = read_plan(workspace)
    bundle = Bundle(number=number, batches=read_batches(workspace, batches))
    beat = heartbeat(workspace.heartbeats, bundle=number)
    try:
        engine = worker_engine()
        beat.ready()
        report = basecall_bundle(
            workspace,
            bundle,
            engine,
            output,
            min_qscore=min_qscore,
            run_numbers={run.info.key: i for i, run in enumerate(plan.runs)},
            progress=lambda batch_id, reads, samples: beat.beat(batch_id=batch_id, reads=reads, samples=samples),
            carefully=carefully,
            accept_missing=accept_missing,
        )
        return replace(report, worker=worker_name())
    except InputError:
        raise  # no worker can help it
    except Exception as error:
        raise WorkerError(f"{type(error).__name__}: {error}", worker_name(), socket.gethostname()) from error
    finally:
        beat.end()


def bundle_name() -> str:
    """Name a task run: `split 00012 · 4 batches · 16000 reads`."""
    given: dict[str, Any] = task_run.parameters
    batches = given["batches"]
    return f"split {given['number']:05d} · {len(batches)} batch{'es' * (len(batches) > 1)} · {given['reads']} reads"


call_bundle_task = task(name="basecall-bundle", task_run_name=bundle_name)(call_bundle)


def call_in_rounds(settings: RunSettings, cluster: Cluster, site: Site, artifact: UUID) -> None:
    """Call what is not committed, for as many rounds as the settings give, and look after the workers meanwhile.

    Args:
        artifact: The progress artifact.

    Raises:
        EngineError: something is still not called after the last round; names the last cause.
    """
    workspace = Workspace(settings.out)
    plan = read_plan(workspace)
    log = get_run_logger()
    slots = cluster.slots
    watchman = Watchman(workspace.heartbeats, cluster, site)
    crew = _Crew(workspace, cluster, most_workers=site.most_workers)
    submitted, cause = 0, ""
    forget_hopeless(workspace)
    left = _not_committed(workspace, plan)
    progress = _Progress(workspace, artifact, estimate=estimated_seconds(left, settings, slots=slots))
    for round_ in range(settings.rounds):
        if not left:
            break
        bundles = bundles_left(left, settings, slots=slots, round_=round_, first=submitted)
        log.info("round %d: %d batches in %d bundles on %d slots", round_ + 1, len(left), len(bundles), slots)
        for failure in _run(
            bundles,
            settings,
            window=2 * slots,
            progress=progress,
            watchman=watchman,
            crew=crew,
            careful=round_ > 0,  # what has failed may well fail again
        ):
            cause = str(failure)
            log.warning("a bundle failed, its uncommitted batches go into the next round: %s", cause)
        submitted += len(bundles)
        left = _not_committed(workspace, plan)
    while suspects := _suspects(workspace, plan):
        before = [read_suspects(workspace, batch) for batch in suspects]
        log.warning("%d batches failed in every round; looking for the reads that break them", len(suspects))
        bundles = tuple(Bundle(number=submitted + i, batches=(batch,)) for i, batch in enumerate(suspects))
        for failure in _run(
            bundles, settings, window=2 * slots, progress=progress, watchman=watchman, crew=crew, careful=True
        ):
            cause = str(failure)
        submitted += len(bundles)
        if before == [read_suspects(workspace, batch) for batch in suspects]:
            break  # it fails before any read is called
    progress.show(last=True)
    tell(workspace, ENDED, "nothing is left to call, or can be called")
    if left := _not_committed(workspace, plan):
        raise EngineError(
            f"{sum(batch.reads for batch in left)} reads in {len(left)} batches could not be called in "
            f"{settings.rounds} rounds; the last cause was: {cause}"
        )


def _not_committed(workspace: Workspace, plan: Plan) -> tuple[Batch, ...]:
    done = committed_ids(workspace)
    return tuple(batch for batch in plan.batches if batch.batch_id not in done)


def _suspects(workspace: Workspace, plan: Plan) -> list[Batch]:
    """Return the batches that are not committed and in which a read may be at fault."""
    left = _not_committed(workspace, plan)
    if len(left) > max(MOST_SEARCHED, len(plan.batches) - len(left)):
        return []
    return [batch for batch in left if not ((found := read_suspects(workspace, batch)) and found.hopeless)]


def _run(
    bundles: Iterable[Bundle],
    settings: RunSettings,
    *,
    window: int,
    progress: _Progress,
    watchman: Watchman,
    crew: _Crew,
    careful: bool,
) -> Iterator[BaseException]:
    """Run bundles, at most `window` of them submitted at a time; yield why each one that failed did.

    Args:
        careful: Where a batch is alone, look for the read that breaks it.
    """
    waiting = deque(bundles)
    running: dict[str, tuple[Any, Bundle]] = {}
    refusals: Counter[int] = Counter()
    submit_from = 0.0
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    log = get_run_logger()
    min_qscore = min_qscore_of(settings)
    while waiting or running:
        while waiting and len(running) < window and time.monotonic() >= submit_from:
            bundle = waiting.popleft()
            future: Any = call_bundle_task.submit(
                str(settings.out),
                bundle.number,
                tuple(batch.number for batch in bundle.batches),
                bundle.reads,
                settings.output,
                min_qscore,
                careful and len(bundle.batches) == 1,
                settings.accept_missing,
            )
            running[future.wrapped_future.key] = future, bundle
            crew.submitted(bundle)
            future.wrapped_future.add_done_callback(lambda wrapped: done.put(wrapped.key))
        for news in watchman.look():
            log.warning("%s", news)
        for beats in watchman.lost():
            crew.lost(beats)
        progress.show()
        try:
            key = done.get(timeout=LOOK_INTERVAL)
        except queue.Empty:
            continue
        future, bundle = running[key]
        try:
            result = _result(future)
        except TimeoutError:  # who held it died, and Dask has it made again: we go on looking after that
            done.put(key)
            continue
        del running[key], future  # and with them the result in the worker's memory
        if _is_api_trouble(result) and refusals[bundle.number] < API_ATTEMPTS:
            refusals[bundle.number] += 1
            waiting.appendleft(bundle)
            submit_from = time.monotonic() + API_PAUSE
            log.info("bundle %d waits for Prefect's API: %s", bundle.number, result)
            continue
        crew.ended(bundle.number, result)
        if isinstance(result, BaseException):
            yield result


def _result(future: Any) -> object:
    """Return what a bundle came to: its report, or why it failed.

    Raises:
        TimeoutError: it did not come to us in a while.
    """
    try:
        return future.result(timeout=RESULT_WITHIN, raise_on_failure=False)
    except Exception as error:  # not the task's own: its worker was killed, or could not reach Prefect
        if isinstance(error, TimeoutError) and future.wrapped_future.status != "error":
            raise
        return error


def _is_api_trouble(result: object) -> bool:
    """Tell whether a bundle could not begin or end since Prefect's API was away: no failure of its own or its worker's.

    A process's first request asks for the version of the API, and says in a bare RuntimeError that nobody answers.
    """
    unreached = isinstance(result, RuntimeError) and str(result).startswith("Failed to reach API")
    return unreached or isinstance(result, (httpx.HTTPError, ConcurrencySlotAcquisitionError))


class _Crew:
    """What this flow's bundles came to on its workers; sets those aside that can't call."""

    def __init__(self, workspace: Workspace, cluster: Cluster, *, most_workers: int) -> None:
        self._workspace = workspace
        self._cluster = cluster
        self._most_workers = most_workers
        self._history: list[Ended] = []
        self._aside: list[SetAside] = []
        self._bundles: dict[int, Bundle] = {}
        workspace.crew.unlink(missing_ok=True)  # an earlier flow's workers are gone

    def submitted(self, bundle: Bundle) -> None:
        """Take note of a bundle that is to be called."""
        self._bundles[bundle.number] = bundle

    def ended(self, number: int, result: object) -> None:
        """Take note of how a bundle ended."""
        if isinstance(result, WorkerError):
            planned = {batch.batch_id for batch in self._bundles[number].batches}
            failed = frozenset(planned - committed_ids(self._workspace))
            self._note(Ended(worker=result.worker, host=result.host, failed=failed, cause=result.message))
        elif isinstance(result, BundleReport) and result.committed:
            self._note(Ended(worker=result.worker))

    def lost(self, beats: Sequence[Beat]) -> None:
        """Take note of a process that died, hung or stalled; Dask may have had its bundles called elsewhere since."""
        planned = {number: [batch.batch_id for batch in bundle.batches] for number, bundle in self._bundles.items()}
        if (ended := died(beats, planned)) is not None:
            self._note(ended)

    def _note(self, ended: Ended) -> None:
        self._history.append(ended)
        names = [one.worker for one in self._aside]
        gone = [name for name in names if not self._cluster.keeps(name)]
        found = to_set_aside(self._history, names, gone=gone, most_workers=self._most_workers)
        if found is not None:
            get_run_logger().warning("%s", found)
            self._cluster.set_aside(found.worker)
            self._aside.append(found)
            tell(self._workspace, ASIDE, str(found))
        failures = sum(bool(one.failed) for one in self._history)
        if failures:
            write_json(self._workspace.crew, {"failures": failures, "aside": [str(one) for one in self._aside]})


class _Cancellation:
    """Whether somebody cancelled this run, or the one it is part of, in Prefect."""

    def __init__(self) -> None:
        self._runs: set[UUID] = set()

    def refuse(self) -> None:
        """Raise StoppedError when it is so."""
        if not self._runs:  # asked for once: the second takes two requests, each by a new client
            self._runs = {UUID(run) for run in (flow_run.id, flow_run.root_flow_run_id) if run}
        with get_client(sync_client=True) as client:
            for run in self._runs:
                state = client.read_flow_run(run).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    client.set_flow_run_state(run, Cancelled(), force=True)  # nobody else would say so
                    raise StoppedError("cancelled in Prefect; the same command goes on from here")


class _Progress:
    """The run's progress artifact and its table of workers, brought up to date every few seconds at most."""

    def __init__(self, workspace: Workspace, artifact: UUID, *, estimate: float) -> None:
        """Begin to look. `estimate`: seconds that calling is thought to take; 0: unknown."""
        self._workspace = workspace
        self._estimate = estimate
        self._late = False
        self._watch = Watch(workspace)
        self._began = time.monotonic()
        self._first: RunProgress | None = None
        self._artifact = artifact
        self._shown = 0.0
        self._looked = 0.0
        self._tabled = self._began - TABLE_INTERVAL + FIRST_TABLE
        self._pace = Pace()
        self._cancellation = _Cancellation()
        self._teller = ThreadPoolExecutor(1, "progress")
        self._telling: Future[None] = Future()
        self._telling.set_result(None)

    def show(self, *, last: bool = False) -> None:
        """Bring both up to date, every few seconds, in the background: Prefect's API may take minutes to answer.

        Raises:
            StoppedError: somebody cancelled the run in Prefect.
        """
        if not last and (time.monotonic() - self._looked < PROGRESS_INTERVAL or not self._telling.done()):
            return
        self._looked = time.monotonic()
        self._telling.result()
        self._telling = self._teller.submit(copy_context().run, self._look)
        if last:
            self._telling.result()
            self._teller.shutdown()

    def _look(self) -> None:
        try:
            self._tell(time.monotonic())
            self._cancellation.refuse()
        except (httpx.HTTPError, PrefectException) as error:  # the API is away: the run goes on without it
            logger.info("Prefect's API does not answer: %s", error)

    def _tell(self, now: float) -> None:
        progress = self._watch.look()
        if progress is None:
            return
        self._first = self._first or replace(progress)
        percent = progress.percent
        if percent > self._shown:
            words = progress_words(progress, since=self._first, seconds=now - self._began)
            update_progress_artifact(self._artifact, percent, description=words)
            self._shown = percent
        if now - self._tabled >= TABLE_INTERVAL:
            self._tabled = now
            rows = self._pace.rows(list(read_heartbeats(self._workspace.heartbeats)), now=time.time())
            if rows:
                create_table_artifact(rows, key="workers", description=f"{len(rows)} slots at work")
            if alive := sum(row["state"] != "late" for row in rows):
                words = f"{alive} of {len(rows)} slots at work give signs of life"
                tell(self._workspace, ALIVE, words, slots=len(rows), alive=alive, percent=percent)
            self._tell_late(progress, now - self._began)

    def _tell_late(self, progress: RunProgress, seconds: float) -> None:
        """Tell once that the run takes longer than was estimated."""
        if not self._late and is_late(seconds, self._estimate):
            self._late = True
            expected, passed = timedelta(seconds=round(self._estimate)), timedelta(seconds=round(seconds))
            words = f"it was thought to take {expected}; after {passed} it is at {progress.percent:.0f} %"
            tell(self._workspace, LATE, words, estimate=self._estimate, seconds=seconds, percent=progress.percent)
