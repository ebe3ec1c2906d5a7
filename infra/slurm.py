"""A Dask cluster whose workers are Slurm jobs, without the holes of dask-jobqueue's.

What this adds to SLURMCluster, each for a fault that was seen: a lost job is replaced, under another name; an sbatch
that failed is tried again; workers are retired by name before their jobs end; jobs that end before their worker came
up, or run without one, are noticed, told and replaced; a job that waits too long is told with Slurm's reason; several
pools serve one queue, grow with the work and shrink when idle; at the end no job of the run is left, even when Slurm
was away meanwhile, or took a job and said that it had not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import distributed
from distributed.core import Status
from distributed.deploy.spec import ProcessInterface

from infra import dask_settings
from infra.local import TICK, Tending, pause, restart
from infra.site import PoolResources, Site, StageResources
from tasks.core.resources import PoolState, correction, format_walltime, lifetime

# Importing it makes Ctrl-C end the process without a word, with status 0; who imports us has chosen otherwise.
_interrupt = signal.getsignal(signal.SIGINT)
from dask_jobqueue.slurm import SLURMCluster, SLURMJob  # noqa: E402

signal.signal(signal.SIGINT, _interrupt)

logger = logging.getLogger(__name__)

#: Seconds between looks at the queue while nothing is amiss.
QUEUE_EVERY = 15.0
#: Seconds after a failed sbatch in which its job may still appear in the queue.
DOUBT = 300.0
#: Seconds within which a command of Slurm's answers, or is killed: more than Slurm's own limit at any site.
ANSWER_WITHIN = 120.0
#: Seconds before a failed sbatch is tried again.
RETRY_AFTER = 5.0
#: Seconds that a worker tries to reach the scheduler before it ends its job.
DEATH_TIMEOUT = 60
#: Seconds that a job may run before its worker is there, which has Python to load from a file system that may be slow.
START_WITHIN = 300.0
#: Jobs in a row that end before a worker came up, after which more of them are no use.
STILLBORN = 5
#: Seconds in which the last jobs must be gone from the queue, at the end.
LEAVE_WITHIN = 60.0
#: Environment variable of a job: seconds since the epoch from which its worker takes no new bundle.
RETIRE_AT = "SHOAL_RETIRE_AT"

#: Dask's own reactions that are others than on one machine: a worker that its nanny restarts keeps its job, for the
#: queue may be long.
SLURM_SETTINGS = {
    "distributed.deploy.lost-worker-timeout": "60s",
    "distributed.comm.timeouts.tcp": "30s",
}


def job_options(resources: StageResources, *, run_id: str, slots: int, logs: Path, scratch: Path | None) -> Any:
    """Say what a stage's jobs are made of, in dask-jobqueue's words."""
    memory = resources.threads * resources.memory_per_thread_gb
    inherited = [f"export PYTHONPATH={shlex.quote(path)}" for path in [os.environ.get("PYTHONPATH")] if path]
    return {
        "job_name": run_id,
        "queue": resources.partition,
        "account": resources.account,
        "walltime": format_walltime(resources.walltime_seconds),
        "cores": slots,
        "processes": 1,
        "job_cpu": resources.threads,
        "memory": f"{memory}GiB",
        "job_mem": f"{round(memory * 1024)}M",
        "job_extra_directives": [
            "--no-requeue",  # we replace it; a second copy would come minutes later
            *([f"--gres={resources.gres}"] if resources.gres else []),
            *resources.extra,
        ],
        # exec: else Slurm's SIGTERM ends the shell, the job counts as done, and the worker lives on outside it.
        "python": f"exec {shlex.quote(sys.executable)}",
        "job_script_prologue": [*dask_settings.in_jobs(), *inherited],
        "worker_extra_args": ["--no-dashboard"],
        "death_timeout": DEATH_TIMEOUT,
        "log_directory": str(logs),
        "local_directory": str(scratch) if scratch else None,
    }


def job_script(resources: StageResources, **options: Any) -> str:
    """Write a job of a stage's as it would be submitted, but for the scheduler's address."""
    options = job_options(resources, **options)
    return str(SlurmJob("tls://127.0.0.1:1", name="worker-0", **options).job_script())


class SlurmJob(SLURMJob):
    """A job that counts as closed once it was cancelled."""

    submitted = 0.0

    async def start(self) -> None:
        """Submit it."""
        self.submitted = time.monotonic()
        await super().start()

    @staticmethod
    async def _call(cmd: Sequence[str], **_: Any) -> str:
        """Run one of Slurm's commands; return what it prints.

        Raises:
            RuntimeError: it failed, or gave no answer and was killed.
        """
        process = await asyncio.create_subprocess_exec(
            *cmd, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(), ANSWER_WITHIN)
        except asyncio.TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            raise RuntimeError(f"{cmd[0]} gave no answer for {ANSWER_WITHIN:.0f} s") from None
        if process.returncode:
            raise RuntimeError(f"{cmd[0]} ended with {process.returncode}\n{out.decode()}\n{err.decode()}")
        return out.decode()

    async def close(self) -> None:
        """Cancel it."""
        await super().close()
        await ProcessInterface.close(self)


@dataclass(slots=True, kw_only=True)
class _Pool:
    """Workers of one kind."""

    name: str
    resources: PoolResources
    options: dict[str, Any]
    made: int = 0


@dataclass(slots=True, kw_only=True)
class _Known:
    """What was seen of a job that was asked for."""

    pool: _Pool
    #: Monotonic seconds since when its worker has had nothing to do.
    idle_since: float
    #: Whether its worker was ever there.
    was_there: bool = False
    told_pending: bool = False
    #: Monotonic seconds since when Slurm calls it running; None while it does not.
    running_since: float | None = None


@dataclass(slots=True, kw_only=True)
class Scaling:
    """How many workers there may be, and when they go."""

    minimum: int
    maximum: int
    slots: int
    #: Seconds.
    idle: float
    drain: int | None = None
    tell_pending_after: float = 120.0


class Queued(NamedTuple):
    """What Slurm says of a job."""

    state: str
    #: The empty string before it has one.
    node: str
    #: Why it waits.
    reason: str


@dataclass(slots=True)
class QueueState:
    """Jobs of the run in Slurm's queue, by job id; None where Slurm did not answer."""

    jobs: dict[str, Queued] | None = None
    looked: float = field(default_factory=lambda: -QUEUE_EVERY)


class SlurmCluster(SLURMCluster):
    """Workers as jobs, in one or several pools, as many as there is work for."""

    job_cls = SlurmJob
    scheduler: Any

    def __init__(
        self, pools: Sequence[PoolResources], site: Site, scaling: Scaling, *, run_id: str, logs: Path, secrets: Path
    ) -> None:
        """Start a scheduler here. Jobs are submitted as bundles come in, and `minimum` of them at once.

        Args:
            run_id: Name of all the jobs.
            logs: Folder for what the jobs print.
            secrets: Folder that all nodes share, for the keys of this cluster's connections; nobody else may read it.
        """
        self._scaling = scaling
        self._run_id = run_id
        self._logs = logs
        self._pools = []
        for number, pool in enumerate(pools):
            options = job_options(pool, run_id=run_id, slots=scaling.slots, logs=logs, scratch=site.scratch)
            self._pools.append(_Pool(name=pool.partition or f"pool{number}", resources=pool, options=options))
        #: Names of workers that get nothing to do, and keep their jobs.
        self.aside: set[str] = set()
        self._known: dict[str, _Known] = {}
        self._queue = QueueState()
        self._stillborn = 0
        self._retry_at = 0.0
        #: Monotonic seconds until when there may be jobs in the queue that are nobody's.
        self._doubt_until = 0.0
        self._tending: Tending | None = None
        #: What the flow should tell; taken by `news`.
        self._news: deque[str] = deque(maxlen=100)
        #: Why more workers are no use; the flow ends with it.
        self.trouble = ""
        super().__init__(
            interface=site.interface,
            security=distributed.Security.temporary(),
            shared_temp_directory=str(secrets),
            scheduler_options={"dashboard_address": site.dashboard},
            **self._pools[0].options,
        )

    async def _start(self) -> None:
        await super()._start()
        self._tending = Tending(self._tend)

    async def _close(self) -> None:
        if self._tending is not None:
            await self._tending.end()
        try:
            with _quiet("distributed.scheduler"):  # it calls the connections that it cuts itself errors
                await super()._close()
        finally:
            for key in ("_job_ca_file", "_job_key", "_job_cert"):
                if file := getattr(self, key, None):
                    file.close()
            if any(pool.made for pool in self._pools):
                await self._see_jobs_leave()

    def news(self) -> list[str]:
        """Take what happened since the last call, in words."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def replace(self, worker: str) -> None:
        """Cancel a worker's job at once, and give its bundles to others; another job takes its place."""
        self.sync(self._replace, worker)

    async def _replace(self, worker: str) -> None:
        self.worker_spec.pop(worker, None)
        job = self.workers.pop(worker, None)
        self._known.pop(worker, None)
        for address in self._addresses(worker):
            await self.scheduler.remove_worker(address, stimulus_id=f"replace-{worker}")
        if job is not None:
            await job.close()
        else:
            self._doubt()

    def restart(self, worker: str) -> None:
        """Start a worker's process, and with it the engine, anew within its job."""
        self.sync(restart, self.scheduler, worker)

    def job_of(self, worker: str) -> str:
        """Return the Slurm job of a worker; the empty string when it has none."""
        job = self.workers.get(worker)
        return (job.job_id or "") if job is not None else ""

    def _addresses(self, worker: str) -> list[str]:
        return [address for address, state in self.scheduler.workers.items() if state.name == worker]

    async def _tend(self) -> None:
        """Heal and scale."""
        try:
            pause(self.scheduler, self.aside)
            await self._look()
            self._scale_to_work()
            await self._correct_state()
        except Exception as error:
            logger.exception("the cluster could not be tended; trying again")
            self._tell(f"the jobs can't be looked after: {type(error).__name__}: {error}")

    async def _correct_state_internal(self) -> None:
        """Bring jobs in line with what is wanted.

        Dask's own gives worker names where addresses are due, so that nobody is retired, and takes a job whose sbatch
        failed for one that lives.
        """
        leaving = [name for name in self.workers if name not in self.worker_spec]
        if leaving and self.scheduler.status == Status.running:
            await self.scheduler.retire_workers(names=leaving)
        try:
            await super()._correct_state_internal()
        except (RuntimeError, OSError, ValueError) as error:
            self._retry_at = time.monotonic() + RETRY_AFTER
            self._tell(f"sbatch failed, it is tried again in {RETRY_AFTER:.0f} s: {_last_line(str(error))}")
        finally:
            for name, job in list(self.workers.items()):
                if job.status == Status.created:  # its sbatch failed
                    job.status = Status.closed
                    del self.workers[name]
                    self._forget(name)
                    self._doubt()

    def _doubt(self) -> None:
        """Look into the queue at once, and for a while."""
        self._doubt_until = time.monotonic() + DOUBT
        self._queue = QueueState()

    async def _look(self) -> None:
        """See which workers are there, which are idle, whose jobs have gone, and which jobs are nobody's."""
        now = time.monotonic()
        there = {state.name: state for state in self.scheduler.workers.values()}
        for name in [name for name in self._known if name in self.worker_spec and name not in self.workers]:
            if self._known[name].was_there:  # Dask gave it up
                self._forget(name)
        for name, known in self._known.items():
            if name in there:
                if not known.was_there:
                    known.was_there = True
                    self._stillborn = 0
                    self._tell(f"worker {name} is there: job {self.job_of(name)} on {there[name].host}")
                    known.idle_since = now
                if there[name].processing:
                    known.idle_since = now
        missing = [name for name in self.workers if name not in there]
        lost = any(self._known[name].was_there for name in missing if name in self._known)
        doubtful = now < self._doubt_until
        if (missing or doubtful) and now - self._queue.looked >= (2 * TICK if lost else QUEUE_EVERY / 3):
            self._queue = QueueState(await self._squeue(), now)
            for name in missing:
                await self._judge_job(name, now)
            if doubtful:
                await self._cancel_strangers()

    async def _cancel_strangers(self) -> None:
        """Cancel jobs of this run that nobody counts: Slurm took them though sbatch failed. None is being submitted."""
        ours = {job.job_id for job in self.workers.values()}
        listed = (self._queue.jobs or {}).items()
        strangers = [job for job, queued in listed if job not in ours and queued.state != "COMPLETING"]
        if strangers:
            logger.warning("jobs in the queue that no worker of ours has are cancelled: %s", ", ".join(strangers))
            with suppress(RuntimeError, OSError):
                await SlurmJob._call(["scancel", *strangers])

    async def _judge_job(self, name: str, now: float) -> None:
        """Tell and replace a job that has gone, or runs without a worker; tell one that waits long."""
        job, known = self.workers.get(name), self._known.get(name)
        if self._queue.jobs is None or job is None or known is None or now - job.submitted < 5 * TICK:
            return
        queued = self._queue.jobs.get(job.job_id, _GONE)
        if queued.state != "RUNNING":
            known.running_since = None
        elif known.running_since is None:
            known.running_since = now
        if queued.state == "PENDING":
            waited = now - job.submitted
            if waited > self._scaling.tell_pending_after and not known.told_pending:
                known.told_pending = True
                self._tell(
                    f"job {job.job_id} for worker {name} has waited for {waited:.0f} s; Slurm says: {queued.reason}"
                )
        elif queued.state in ("", "COMPLETING"):
            await self._give_up(name, job)
            if known.was_there:
                self._tell(f"job {job.job_id} of worker {name} has ended; another takes its place")
            else:
                self._count_stillborn(job, "ended before its worker came up")
        elif known.running_since is not None and not known.was_there and now - known.running_since > START_WITHIN:
            await self._give_up(name, job)
            ran = now - known.running_since
            self._count_stillborn(job, f"ran for {ran:.0f} s on {queued.node} and its worker {name} did not come up")

    async def _give_up(self, name: str, job: SlurmJob) -> None:
        self.workers.pop(name)
        self._forget(name)
        await job.close()

    def _count_stillborn(self, job: SlurmJob, what: str) -> None:
        self._stillborn += 1
        said = _tail(self._logs / f"{self._run_id}-{job.job_id}.err")
        self._tell(f"job {job.job_id} {what}; {said}")
        if self._stillborn >= STILLBORN:
            self.trouble = f"{STILLBORN} Slurm jobs in a row ended before a worker came up; of the last one, {said}"

    def _scale_to_work(self) -> None:
        """Ask for workers where bundles wait, and give back those that idle."""
        now = time.monotonic()
        if now < self._retry_at or self.trouble:
            return
        bundles = sum(
            task.state in _UNFINISHED and (task.processing_on is None or task.processing_on.name not in self.aside)
            for task in self.scheduler.tasks.values()
        )
        by_pool: list[dict[str, float]] = []
        states: list[PoolState] = []
        for pool in self._pools:
            names = [name for name, known in self._known.items() if known.pool is pool and name in self.worker_spec]
            idle = {name: now - self._known[name].idle_since for name in names if name not in self.aside}
            by_pool.append(idle)
            states.append(
                PoolState(
                    maximum=pool.resources.maximum,
                    workers=len(idle),
                    idle=sum(seconds >= self._scaling.idle for seconds in idle.values()),
                    aside=sum(name in self.aside and name in self.workers for name in names),
                )
            )
        scaling = self._scaling
        add, drop = correction(
            states, bundles=bundles, slots=scaling.slots, minimum=scaling.minimum, maximum=scaling.maximum
        )
        if bundles and not any(add) and not any(state.workers for state in states):
            self.trouble = "all workers that there may be were set aside, and nobody is left who could call"
        for pool, idle, more, fewer in zip(self._pools, by_pool, add, drop, strict=True):
            for name in sorted(idle, key=lambda name: -idle[name])[:fewer]:
                self._tell(f"worker {name} had nothing to do for {idle[name]:.0f} s and gives its job back")
                self._forget(name)
            for _ in range(more):
                self._ask_for(pool, now)

    def _ask_for(self, pool: _Pool, now: float) -> None:
        number, pool.made = pool.made, pool.made + 1
        name = f"{pool.name}-{number}"
        retire = lifetime(pool.resources.walltime_seconds, number, self._scaling.drain)
        options = {
            **self._job_kwargs,
            **pool.options,
            "job_script_prologue": [
                *pool.options["job_script_prologue"],
                f"export {RETIRE_AT}=$(( $(date +%s) + {retire} ))",
            ],
        }
        self.worker_spec[name] = {"cls": self.job_cls, "options": options}
        self._known[name] = _Known(pool=pool, idle_since=now)

    def _forget(self, name: str) -> None:
        self.worker_spec.pop(name, None)
        self._known.pop(name, None)

    def _tell(self, text: str) -> None:
        logger.info("%s", text)
        if not self._news or self._news[-1] != text:
            self._news.append(text)

    async def _squeue(self) -> dict[str, Queued] | None:
        try:
            listed = await SlurmJob._call(["squeue", "--noheader", "--name", self._run_id, "--format", "%A|%T|%N|%r"])
        except (RuntimeError, OSError) as error:
            logger.warning("squeue failed: %s", _last_line(str(error)))
            return None
        rows = (line.strip().split("|", 3) for line in listed.splitlines() if line.strip())
        return {job: Queued(*said) for job, *said in rows}

    async def _see_jobs_leave(self) -> None:
        """Cancel what is left by name until the queue shows none: a scancel may have failed while Slurm was away."""
        deadline = time.monotonic() + LEAVE_WITHIN
        while (jobs := await self._squeue()) != {}:
            if time.monotonic() > deadline:
                logger.error("jobs may be left in Slurm's queue; cancel them: scancel --name %s", self._run_id)
                return
            if jobs and any(queued.state != "COMPLETING" for queued in jobs.values()):
                with suppress(RuntimeError, OSError):
                    await SlurmJob._call(["scancel", "--name", self._run_id])
            await asyncio.sleep(0.3)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


_GONE = Queued("", "", "")
_UNFINISHED = frozenset({"waiting", "queued", "no-worker", "processing"})


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "error" in line.lower()]
    return (said or lines or [""])[-1]


def _tail(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return f"it left no log {log}"
    return f"its log {log} ends with: {lines[-1]}" if lines else f"its log {log} is empty"
